"""Packages of Mamba-3: right without gdn2gen, forward and backward; what they refuse; how they are
made of what stages there are."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bare_packages import ask

import gdn2gen
from gdn2gen.base.device import named_device
from gdn2gen.base.errors import InputError, TemplateError, TuneError
from gdn2gen.base.outcome import OK, Outcome
from gdn2gen.cli import program
from gdn2gen.codegen import _mamba3_package
from gdn2gen.codegen._part_launches import launches_of, summed
from gdn2gen.codegen.package import generate_mamba3_package
from gdn2gen.family.mamba3_problem import Mamba3Problem, usual_mamba3_problem
from gdn2gen.family.shapes import Shape, parse_shapes
from gdn2gen.kernels.mamba3_chunks import CHUNKS, MAMBA3_CHUNK_STAGES, chunk_problem
from gdn2gen.kernels.parts import PartStage
from gdn2gen.kernels.stage import Operand
from gdn2gen.store.mamba3 import find_mamba3, ruled
from gdn2gen.tuning import mamba3_packages
from gdn2gen.tuning.mamba3_packages import mamba3_command

H200 = named_device("H200")
BARE = {"skip": False, "gate": False}
FULL = {"carried": True, "packed": True}


def generated(folder: Path, *, fast: bool = False, BT: int = 32, **fields: Any) -> list[Path]:
    """In small chunks, of which there are several then."""
    problem = usual_mamba3_problem(24, 16, fields.pop("dtype", "fp32"), fields)
    knobs = ruled(problem, Shape("small", 1, 70, 2, groups=1), H200, CHUNKS)
    knobs = {x: {**y, "BT": BT} for x, y in knobs.items()}
    command = mamba3_command(problem, Shape("small", 1, 70, 2, groups=1))
    return generate_mamba3_package(problem, knobs, folder, command, fast=fast)


@pytest.mark.resolved
@pytest.mark.parametrize(
    ("fields", "fast"),
    [
        (FULL, False),
        pytest.param({"carried": True}, True, marks=pytest.mark.slow),
        ({**BARE, "angles": 0}, False),
    ],
    ids=["full", "fast", "bare"],
)
def test_a_package_passes_its_own_test_without_gdn2gen(
    fields: dict[str, Any], fast: bool, tmp_path: Path
) -> None:
    generated(tmp_path / "made", fast=fast, **fields)
    done = ask(tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    found = {x: float(y) for x, y in re.findall(r"^(\w+) +(\S+)$", done.stdout, re.M)}
    named = {"out", "last_ssm", "dQ", "dK", "dV", "dADT", "dDT", "dTrap", "dQ_bias", "dK_bias"}
    named |= set() if "angles" in fields else {"last_angle", "dAngles", "dD", "dZ"}
    named |= {"dssm", "dk", "dv", "dangle"} if "carried" in fields else set()
    assert named <= {*found} and max(found.values()) < 1e-5


def test_its_own_test_can_fail(tmp_path: Path) -> None:
    generated(tmp_path / "made", **BARE, angles=0)
    path = tmp_path / "made/__init__.py"
    path.write_text(path.read_text().replace("dK.to(K.dtype)", "dQ.to(K.dtype)"))
    done = ask(tmp_path)
    assert done.returncode != 0 and re.search(r"dK .*WRONG", done.stdout)


_CALLS = """
import json, sys, torch
from made import mamba3_siso_combined as op

def given(**changes):
    n = lambda *x: torch.rand(x)
    found = dict(Q=n(1, 20, 1, 24), K=n(1, 20, 1, 24), V=n(1, 20, 2, 16), ADT=-n(1, 2, 20),
        DT=n(1, 2, 20), Trap=n(1, 2, 20), Q_bias=n(2, 24), K_bias=n(2, 24),
        Angles=n(1, 20, 1, 6).expand(1, 20, 2, 6), D=n(2), Z=n(1, 20, 2, 16))
    return found | changes
"""


def _answers(folder: Path, calls: list[str]) -> list[str]:
    """What each call raises, or its value's words."""
    (folder / "made/test_kernels.py").write_text(
        _CALLS.replace("from made", "from .")
        + f"""
said = []
for words in {calls!r}:
    try:
        said.append(str(eval(words)))
    except (ValueError, TypeError) as error:
        said.append(f"{{type(error).__name__}}: {{error}}")
print(json.dumps(said))
"""
    )
    done = ask(folder)
    assert done.returncode == 0, done.stderr
    answers: list[str] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_what_it_was_not_made_for_is_refused_by_name(tmp_path: Path) -> None:
    generated(tmp_path / "made")
    wanted = {
        "op(**given(cu_seqlens=torch.tensor([0, 20])))": "--with packed",
        "op(**given(Input_States=()))": "--with carried",
        "op(**given(D=None))": "D must be a tensor, but got NoneType",
        "op(**given(Z=torch.rand(1, 20, 2, 8)))": "Z must be (1, 20, 2, 16)",
        "op(**given(V=torch.rand(1, 20, 2, 16).half()))": "V must be",
        "op(**given(Q=torch.rand(20, 24)))": "Q must be [B, T, heads, dim]",
        "op(**given(Trap=torch.rand(1, 2, 20).double()))": "Trap must be (1, 2, 20) torch.float32",
        "op(**given(ADT=torch.zeros(1, 2, 20).int()))": "ADT must be of floating point",
        "op(**given(chunk_size=48))": "chunk_size must be a power of two",
        "op(**given(return_final_states=1))": "return_final_states must be a bool",
        "op(**given(V=torch.rand(1, 20, 3, 16), Q=torch.rand(1, 20, 2, 24)))": "a multiple of G",
        "op(**given(surprise=1))": "surprise",
    }
    for words, found in zip(wanted, _answers(tmp_path, [*wanted]), strict=True):
        assert wanted[words] in found and "Error" in found, (words, found)


def test_edges(tmp_path: Path) -> None:
    """No tokens, no gradients, one of Angles for all heads; states before chunks kept or not."""
    generated(tmp_path / "made", carried=True)
    calls = [
        "[tuple(x.shape) for x in op(**{x: y[:, :0] if x in 'QKVZAngles' else y[..., :0] "
        "if x in ('ADT', 'DT', 'Trap') else y for x, y in given().items()}, "
        "return_final_states=True)]",
        "(lambda x: [torch.equal(op(**x), op(**(x | dict(Angles=x['Angles'].clone()))))])(given())",
        "(lambda x: [torch.equal(*(torch.autograd.grad(op(**x, disable_recompute=y).sum(), "
        "x['K'])[0] for y in (False, True)))])(given(K=torch.rand(1, 20, 1, 24, "
        "requires_grad=True)))",
    ]
    shapes, shared, kept = _answers(tmp_path, calls)
    assert shapes == str([(1, 0, 2, 16), (1, 2, 6), (1, 2, 16, 24), (1, 2, 24), (1, 2, 16)])
    assert shared == kept == "[True]"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_what_is_written(dtype: str, tmp_path: Path) -> None:
    """Only torch and triton are imported, a linter is content, arguments are the op's."""
    files = generated(tmp_path / "made", dtype=dtype, **FULL)
    names = {x.stem for x in files}
    assert {x.name for x in MAMBA3_CHUNK_STAGES} < names and {"README", "test_kernels"} < names
    for path in files:
        text = path.read_text()
        assert "gdn2gen generate" in text
        if path.suffix != ".py":
            continue
        imported = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(text))
            for name in (
                [x.name for x in node.names] if isinstance(node, ast.Import)
                else [node.module or "made"] if isinstance(node, ast.ImportFrom) else []
            )
        }  # fmt: skip
        assert imported <= {"torch", "triton", "made", "math", "hashlib", "os"}
    own = [str(tmp_path / "made" / x) for x in ("__init__.py", "test_kernels.py")]
    rules = ["--isolated", "--line-length=100", "--select=E,F,I,B,UP,SIM,RUF"]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", *rules, *own],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    source = (tmp_path / "made/__init__.py").read_text()
    (function,) = (
        x for x in ast.parse(source).body
        if isinstance(x, ast.FunctionDef) and x.name == "mamba3_siso_combined"
    )  # fmt: skip
    ours = inspect.signature(gdn2gen.mamba3_siso_combined).parameters
    assert [x.arg for x in function.args.args] == [*ours]
    # which Triton's interpreter could not run
    assembly = (tmp_path / "made/mamba3_rotate.py").read_text().count("inline_asm")
    assert (assembly > 0) == (dtype == "bf16")


# Of whatever stages there are


def test_launches_follow_from_what_stages_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient in two stages instead of one is launched so, and its buffers are made."""
    problem = usual_mamba3_problem(24, 16, "fp32", {})
    *others, gradient = MAMBA3_CHUNK_STAGES
    moved = [x for x in gradient.outputs if x.name in ("dADT", "dDT", "dTrap", "dAngles")]
    first = replace(gradient, outputs=tuple(x for x in gradient.outputs if x not in moved))
    scratch = tuple(x for x in first.outputs if x.name in ("down_dt", "dread"))
    second = replace(gradient, name="numbers", inputs=(*gradient.inputs, *scratch), outputs=moved)
    given = ("Q", "K", "V", "ADT", "DT", "Trap", "Q_bias", "K_bias", "Angles", "D", "Z")
    arriving = ("dout", "dfinal_ssm", "dlast_angle", "dlast_turn")

    def own(stage: PartStage) -> Mamba3Problem:
        return chunk_problem(gradient if stage in (first, second) else stage, problem)

    forward, backward = launches_of((*others, first, second), own, given, arriving)
    assert [x.module for x in (*forward, *backward)] == [
        *(x.name for x in others), "mamba3_gradient", "numbers"
    ]  # fmt: skip
    assert {"down_dt", "dread"} <= {*backward[-1].reads}
    assert [x.name for x in backward[-1].makes] == [x.name for x in moved]
    with pytest.raises(TemplateError, match="numbers reads down_dt, dread, which no call is given"):
        launches_of((*others, second), own, given, arriving)


def test_gradients_in_parts_are_summed() -> None:
    assert summed(Operand("dQ", "B T G N"), "B T G N") == "dQ"
    assert summed(Operand("dQ_part", "R B T G N"), "B T G N") == "dQ_part.sum(0)"
    assert summed(Operand("down", "B T H"), "H") == "down.sum((0, 1))"
    with pytest.raises(TemplateError, match="no gradient of"):
        summed(Operand("dQ", "B T N"), "B T G N")


def test_a_gradient_that_nobody_makes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    *others, gradient = MAMBA3_CHUNK_STAGES
    outputs = tuple(x for x in gradient.outputs if x.name != "dDT")
    stages = (*others, replace(gradient, outputs=outputs))
    monkeypatch.setattr(_mamba3_package, "MAMBA3_CHUNK_STAGES", stages)
    problem = usual_mamba3_problem(24, 16, "fp32", {})
    knobs = ruled(problem, Shape("small", 1, 70, 2, groups=1), H200, CHUNKS)
    with pytest.raises(TemplateError, match="makes ddt or ddt_part, the gradient of DT"):
        _mamba3_package.mamba3_package_texts(problem, knobs, command="", origin="", fast=False)


# The command


class _Pool:
    """Compiles nothing."""

    def __init__(self, slots: int) -> None:
        self.asked: list[str] = []

    def close(self) -> None:
        pass


@pytest.fixture(name="checked")
def _checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What is given to the check, without compilers and interpreter."""
    told: dict[str, Any] = {"wrong": ""}

    def compiled(found: Any, *_: Any) -> Any:
        from gdn2gen.codegen.build import Resources

        return found.knobs, {x: Resources(64, 0, 1024, 128, 1.0) for x in found.knobs}, {}

    def interpret(_: Any, problem: Any, shape: Any, BT: int, knobs: Any) -> Outcome[Any]:
        told.update(problem=problem, shape=shape, BT=BT, knobs=knobs)
        return Outcome(OK, ({"out": 1e-7}, told["wrong"]))

    monkeypatch.setattr(mamba3_packages, "CompilePool", _Pool)
    monkeypatch.setattr(mamba3_packages, "_compiled", compiled)
    monkeypatch.setattr(mamba3_packages, "interpret_parts", interpret)
    yield told


def test_verified_head_dims_are_written_as_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--op", "mamba3", "--head-dim", "128,64", "--target", "H200", "--out"]
    assert program.main([*words, str(tmp_path / "made")]) == 0
    said = capsys.readouterr().out
    assert "mamba3_gradient: BT=" in said and "wrote" in said and "torch and triton" in said
    problem, (shape,) = usual_mamba3_problem(128, 64, "bf16", {}), parse_shapes("mamba4k")
    knobs = find_mamba3(problem, shape, H200).knobs
    module = (tmp_path / "made/mamba3_states.py").read_text()
    assert f"BT={knobs['mamba3_states']['BT']} BV={knobs['mamba3_states']['BV']}" in module


def test_others_are_proven_first(tmp_path: Path, checked: dict[str, Any]) -> None:
    made = gdn2gen.generate(
        tmp_path / "made", op="mamba3", head_dim=48, value_dim=24, target="sm_86", shape="2x70x8/2",
        gate=False, carried=True,
    )  # fmt: skip
    assert made.proof is not None and "interpreter" in made.proof.where
    assert checked["problem"].dtype == "fp32" and not checked["problem"].gate
    heads = [int(x["BH"]) for x in checked["knobs"].values() if "BH" in x]
    assert all(checked["shape"].H % x == 0 for x in heads) and checked["BT"] < checked["shape"].T
    readme = (tmp_path / "made/README.md").read_text()
    assert "by a rule on the" in readme and "without Z, with states from before" in readme
    checked["wrong"] = "accuracy-layer: above"
    with pytest.raises(TuneError, match="failed their check on Triton's interpreter"):
        gdn2gen.generate(tmp_path / "b", op="mamba3", head_dim=48, value_dim=24, target="sm_86")
    assert not (tmp_path / "b").exists()


def test_the_command_makes_the_same_problem_again(
    tmp_path: Path, checked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"gate": False, "packed": True, "angles": 6, "trap_dtype": "bf16"}
    problem = usual_mamba3_problem(48, 24, "fp16", fields)
    command = mamba3_command(problem, parse_shapes("1x70x4/2")[0])
    words = command.removeprefix("gdn2gen ").replace("--out DIR", "").split()
    assert "gate:no" in command and "angles:6" in command and "skip" not in command
    assert program.main([*words, "--target", "sm_86", "--out", str(tmp_path / "made")]) == 0
    assert checked["problem"] == replace(problem, dtype="fp32")
    readme = (tmp_path / "made/README.md").read_text().replace("\\\n", "")
    assert command in " ".join(readme.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--with gate:yes", "skip, gate"),
        ("--gate softplus", "leave --gate"),
        ("--with weight_dtype:fp16", "leave weight_dtype out"),
        ("--shape 1x70x4,2x70x4", "made for one shape"),
    ],
)
def test_what_the_command_refuses(
    words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"generate --op mamba3 --head-dim 128,64 --target H200 --out {tmp_path / 'x'} {words}"
    assert program.main(line.split()) != 0
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        gdn2gen.generate(tmp_path, op="mamba3", head_dim=128, value_dim=64, target="H200")
    assert [x.name for x in tmp_path.iterdir()] == ["notes.txt"]
