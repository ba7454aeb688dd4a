"""Generated packages: they work without gdn2gen, refuse what they are not made for, and overwrite
only themselves."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_packages import ask

from gdn2gen.base import device
from gdn2gen.base.errors import FileError, InputError
from gdn2gen.cli import program
from gdn2gen.codegen import _package_files
from gdn2gen.codegen.package import generate_package, package_source, package_texts
from gdn2gen.codegen.render import render
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import RECURRENCES
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.plans import PLANS
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.accuracy import (
    inputs_of,
    op_flags,
    output_gradients,
    relative_errors,
    run_reference,
)
from gdn2gen.store.dispatch import Found, generate_command
from gdn2gen.tuning import packages

PLAIN = Problem(K=32, V=32, dtype="fp32")
FULL = Problem(
    K=32,
    V=64,
    dtype="fp32",
    gate="softplus",
    has_A_log=True,
    has_dt_bias=True,
    varlen=True,
    initial_state=True,
    final_state=True,
    state_v_first=True,
)
BOUNDED = replace(PLAIN, gate="sigmoid", l2norm=False, final_state=True)
TIED = Problem("kda", K=64, V=32, dtype="fp32", initial_state=True)
TIED_WIDE = replace(TIED, dtype="fp16", beta_fp32=True)
TIED_FULL = replace(FULL, op="kda", K=64, beta_sigmoid=True, neg_eigval=True)


def _call(problem: Problem, shape: Shape, **changes: Any) -> dict[str, dict[str, Any]]:
    arguments = inputs_of(problem, shape, "layer", 0, "cpu") | op_flags(problem)
    arguments |= {"output_final_state": problem.final_state, **changes}
    return {"arguments": arguments, "gradients": output_gradients(problem, shape, 0, "cpu")}


def _run(folder: Path, jobs: list[tuple[str, list[dict[str, dict[str, Any]]]]]) -> list[Any]:
    question, answer = folder / "jobs.pt", folder / "answers.pt"
    torch.save(jobs, question)
    done = ask(folder, question, answer)
    assert done.returncode == 0, done.stderr
    answers: list[Any] = torch.load(answer)
    return answers


def command_of(recipe: Recipe) -> str:
    return generate_command(Found(recipe, "default", ""))


def generated(folder: str | Path, recipe: Recipe, *, force: bool = False) -> list[Path]:
    return generate_package(recipe, folder, command_of(recipe), force=force)


@pytest.mark.resolved
def test_packages_work_without_gdn2gen(tmp_path: Path) -> None:
    packed = Shape("packed", 1, 70, 1, (0, 0, 40, 41, 70))
    made = {
        "plain": (PLAIN, "lean", Shape("two", 2, 40, 1)),
        "full": (FULL, "fast", packed),
        "full_lean": (FULL, "lean", packed),
        "full_states": (FULL, "states", packed),
        "blocks": (PLAIN, "blocks2", Shape("two", 2, 40, 1)),
        "full_blocks": (FULL, "blocks4_states", packed),
        "bounded": (BOUNDED, "fast", Shape("one", 1, 33, 1)),
        "tied": (TIED, "lean", Shape("two", 2, 40, 1)),
        "tied_full": (TIED_FULL, "fast", packed),
        "tied_sigmoid": (replace(TIED, beta_sigmoid=True), "states", Shape("one", 1, 20, 2)),
        "tied_wide": (TIED_WIDE, "lean", Shape("two", 2, 40, 1)),
        "empty": (replace(PLAIN, initial_state=True, final_state=True), "lean", Shape("", 2, 0, 1)),
    }
    for name, (problem, plan, _) in made.items():
        generated(tmp_path / name, Recipe.default(problem, plan))
    jobs = [(name, [_call(problem, shape)]) for name, (problem, _, shape) in made.items()]
    answers = dict(zip(made, _run(tmp_path, jobs), strict=True))
    empty = answers.pop("empty")
    call = dict(jobs)["empty"][0]
    assert torch.equal(empty["final_state"], call["arguments"]["initial_state"])
    assert torch.equal(empty["dinitial_state"], call["gradients"]["final_state"])
    assert empty["dq"].shape == (2, 0, 1, 32)
    for name, (call,) in jobs[: len(answers)]:
        problem = made[name][0]
        inputs = {key: x for key, x in call["arguments"].items() if isinstance(x, torch.Tensor)}
        exact = run_reference(problem, inputs, call["gradients"])
        assert {*answers[name]} == {*exact}
        errors = relative_errors(answers[name], exact)
        assert max(errors.values()) < (2e-5 if problem.dtype == "fp32" else 2e-3), (name, errors)
    assert answers["tied_wide"]["dbeta"].dtype == torch.float32
    for name in ("full_lean", "full_states"):
        torch.testing.assert_close(answers["full"], answers[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scan", ["scan", "scan_states"])
def test_each_direction_has_its_own_segments(scan: str) -> None:
    recipe = Recipe.default(PLAIN, "lean" if scan == "scan" else "states")

    def counts(**max_segments: int) -> list[str]:
        chosen = [
            recipe[stage].replace(segments="parallel", BV=16, max_segments=x)
            for stage, x in max_segments.items()
        ]
        source = package_source(recipe.with_config(*chosen), "gdn2gen generate")
        return re.findall(r"_segments\(T, N \* HV, (\d+)\)", source)

    assert counts(**{scan: 112, "reverse_scan": 64}) == ["112", "112", "64"]
    assert counts(**{scan: 112, "reverse_scan": 112}) == ["112", "112"]


@pytest.mark.parametrize("how", ["negative", "hooked"])
def test_what_kernels_cannot_read_is_read_as_its_copy(how: str, tmp_path: Path) -> None:
    """Lazily negated views; and what hooks on saved tensors lay out anew, tables among them."""
    problem = replace(FULL, varlen=how == "hooked")
    generated(tmp_path / "full", Recipe.default(problem))
    call = _call(problem, Shape("one", 1, 20, 1, (0, 7, 20) if problem.varlen else None))
    plain, other = _run(tmp_path, [("full", [call, {**call, how: True}])])
    assert {*plain} == {*other}
    for name, x in plain.items():
        assert torch.equal(x, other[name]), name


def test_transforms_are_refused(tmp_path: Path) -> None:
    generated(tmp_path / "plain", Recipe.default(PLAIN))
    call: dict[str, Any] = _call(PLAIN, Shape("one", 1, 20, 1))
    ((kind, message),) = _run(tmp_path, [("plain", [{**call, "mapped": True}])])
    assert kind == "ValueError" and "need gdn2gen.chunk_gdn2" in message


def test_bf16_is_refused_in_the_interpreter(tmp_path: Path) -> None:
    """Which would compute with its bits; gdn2gen teaches it bf16, and a package stands alone."""
    problem = replace(PLAIN, dtype="bf16")
    generated(tmp_path / "brain", Recipe.default(problem))
    ((kind, message),) = _run(tmp_path, [("brain", [_call(problem, Shape("one", 1, 20, 1))])])
    assert kind == "ValueError"
    assert "interpreter" in message and "--dtype fp32" in message


def test_what_a_package_was_not_made_for_is_refused(tmp_path: Path) -> None:
    generated(tmp_path / "plain", Recipe.default(PLAIN))
    generated(tmp_path / "full", Recipe.default(FULL))
    generated(tmp_path / "tied", Recipe.default(TIED))
    generated(tmp_path / "wide", Recipe.default(TIED_WIDE))
    shape, packed = Shape("two", 2, 20, 1), Shape("packed", 1, 20, 1, (0, 5, 20))
    good = _call(PLAIN, shape)["arguments"]
    plain: list[tuple[dict[str, Any], str]] = [
        ({"initial_state": torch.zeros(2, 1, 32, 32)}, "--with initial_state"),
        ({"output_final_state": True}, "--with final_state"),
        ({"A_log": torch.zeros(1)}, "--with A_log"),
        ({"dt_bias": torch.zeros(32)}, "--with dt_bias"),
        ({"cu_seqlens": torch.tensor([0, 20])}, "--with varlen"),
        ({"lower_bound": -5.0}, "--gate sigmoid"),
        ({"use_gate_in_kernel": True}, "--gate softplus"),
        ({"use_qk_l2norm_in_kernel": False}, "--no-l2norm"),
        ({"state_v_first": True}, "--with state_v_first"),
        ({"q": good["q"].half()}, "q must be (2, 20, 1, 32) torch.float32"),
        ({"q": good["q"][0]}, "q must be [B, T, heads, dim], but got shape (20, 1, 32)"),
        ({"v": good["v"][..., :16]}, "v must be (2, 20, 1, 32)"),
        ({"k": good["k"][:, :7]}, "but got (2, 7, 1, 32)"),
        ({"g": good["g"].double()}, "g must be (2, 20, 1, 32) torch.float32"),
        ({"g": good["g"].repeat(1, 1, 3, 1)}, "3 heads of g"),
        ({"q": None}, "q must be a tensor, but got NoneType"),
        ({"k": [1.0]}, "k must be a tensor, but got list"),
        ({x: y.to("meta") for x, y in good.items() if isinstance(y, torch.Tensor)}, "on meta"),
        ({"surprise": 1}, "surprise"),
    ]
    full: list[tuple[dict[str, Any], str]] = [
        ({"A_log": None}, "A_log must be a tensor"),
        ({"dt_bias": None}, "dt_bias must be a tensor"),
        ({"output_final_state": "no"}, "output_final_state must be a bool"),
        ({"cu_seqlens": [0, 20]}, "cu_seqlens must be a tensor, but got list"),
        ({"cu_seqlens": None}, "need cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 21])}, "rise from 0 to T=20, but got [0, 21]"),
        ({"cu_seqlens": torch.tensor([0, 9, 5, 20])}, "[0, 9, 5, 20]"),
        ({"cu_seqlens": torch.tensor([0.0, 20.0])}, "int32 or int64"),
        ({"cu_seqlens_cpu": torch.tensor([0])}, "cu_seqlens_cpu must be (3,)"),
        ({"initial_state": torch.zeros(2, 1, 32, 64)}, "initial_state must be (2, 1, 64, 32)"),
        ({"dt_bias": torch.zeros(33)}, "dt_bias must be (32,)"),
    ]
    tied: list[tuple[dict[str, Any], str]] = [
        ({"use_beta_sigmoid_in_kernel": True}, "with --with beta_sigmoid"),
        ({"allow_neg_eigval": True}, "with --with beta_sigmoid,neg_eigval"),
        ({"beta": None}, "beta must be a tensor, but got NoneType"),
        ({"beta": torch.ones(2, 20, 1, 1)}, "beta must be (2, 20, 1) torch.float32"),
        ({"w": good["w"], "surprise": 1}, "unexpected keyword argument 'w'"),
    ]
    wide: list[tuple[dict[str, Any], str]] = [
        ({"beta": torch.ones(2, 20, 1).half()}, "beta must be (2, 20, 1) torch.float32"),
    ]
    jobs = [
        ("plain", [_call(PLAIN, shape, **changes) for changes, _ in plain]),
        ("full", [_call(FULL, packed, **changes) for changes, _ in full]),
        ("tied", [_call(TIED, shape, **changes) for changes, _ in tied]),
        ("wide", [_call(TIED_WIDE, shape, **changes) for changes, _ in wide]),
    ]
    answers = _run(tmp_path, jobs)
    for (changes, said), answer in zip((*plain, *full, *tied, *wide), answers, strict=True):
        assert isinstance(answer, tuple), f"{[*changes]} was not refused"
        kind, message = answer
        assert kind == ("TypeError" if "surprise" in changes else "ValueError"), message
        assert said in message


@pytest.mark.parametrize("plan", RECURRENCES["gdn2"].plans)
def test_the_same_arguments_give_the_same_bytes(plan: str, tmp_path: Path) -> None:
    # what has no form in Triton serves neither fp32 nor packed batches
    size = 128 if plan == "whole_blocks2_states" else 64
    alone = Problem(K=size, V=size, initial_state=True, final_state=True)
    problem = alone if PLANS[plan].instead else FULL
    recipe = Recipe.default(problem, plan)
    first = generated(tmp_path / "a", recipe)
    second = generated(tmp_path / "b", recipe)
    assert [path.name for path in first] == sorted(
        ["README.md", "__init__.py", "test_kernels.py"]
        + ["chunk_tables.py"] * problem.varlen
        + [f"{stage}.py" for stage in PLANS[plan].stages]
    )
    assert [x.read_bytes() for x in first] == [x.read_bytes() for x in second]
    for stage in PLANS[plan].stages:
        source = render(problem, stage, recipe[stage]).source
        *lines, last = (tmp_path / "a" / f"{stage}.py").read_text().splitlines(keepends=True)
        assert "".join(lines) == source
        assert re.fullmatch("# as generated: the digest of all above is [0-9a-f]{16}\n", last)


@pytest.mark.parametrize(
    "problem", [PLAIN, FULL, BOUNDED, Problem(), TIED, TIED_WIDE, TIED_FULL], ids=str
)
def test_the_package_is_clean(problem: Problem, tmp_path: Path) -> None:
    generated(tmp_path / "made", Recipe.default(problem))
    files = [str(tmp_path / "made" / name) for name in ("__init__.py", "test_kernels.py")]
    rules = ["--isolated", "--line-length=100", "--select=E,F,I,B,UP,SIM,RUF"]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", *rules, *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


_ODD = Problem(K=40, V=24, dtype="fp32", initial_state=True, final_state=True)


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(
            replace(_ODD, l2norm=False, gate="sigmoid", has_A_log=True, varlen=True),
            id="sigmoid-packed",
            marks=pytest.mark.slow,
        ),
        pytest.param(replace(TIED_FULL, K=24, V=40, beta_sigmoid=True, neg_eigval=True), id="kda"),
    ],
)
def test_a_package_brings_its_own_test(problem: Problem, tmp_path: Path) -> None:
    """Which passes where the kernels are right."""
    generated(tmp_path / "made", Recipe.default(problem))
    done = _own_test(tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"o", "dq", "dk", "dv", "dg"} <= {x.split()[0] for x in done.stdout.splitlines()}


def test_a_packages_own_test_fails_where_a_kernel_is_wrong(tmp_path: Path) -> None:
    generated(tmp_path / "made", Recipe.default(replace(_ODD, initial_state=False)))
    scan = tmp_path / "made/scan.py"
    wrong = scan.read_text().replace("b_S1 = tl.dot(b_Rd,", "b_S1 = 1.01 * tl.dot(b_Rd,")
    assert wrong != scan.read_text()
    scan.write_text(wrong)
    done = _own_test(tmp_path)
    assert done.returncode == 1 and "AssertionError: off by more than" in done.stderr
    assert "WRONG" in done.stdout


@pytest.mark.parametrize("op", ["gated_delta_rule", "delta_rule", "simple_gla"])
def test_a_package_of_a_member_with_less_is_right_and_says_so(op: str, tmp_path: Path) -> None:
    """By its own test, which knows decays of a head, none, and what nothing erases."""
    gates: dict[str, Any] = {"gate": "softplus", "has_A_log": True, "has_dt_bias": True}
    given = gates if op == "gated_delta_rule" else {}
    problem = Problem(op, K=16, V=24, dtype="fp32", final_state=True, **given)
    generated(tmp_path / "made", Recipe.default(problem))
    done = _own_test(tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"initial_state": True, "state_v_first": True, "has_z": True}, id="gated"),
        pytest.param({"varlen": True}, id="packed", marks=pytest.mark.slow),
    ],
)
def test_a_package_of_mamba2_is_right(fields: dict[str, Any], tmp_path: Path) -> None:
    """Steps, their rate and bias, the skip and the output's gate; two heads that share a group."""
    given: dict[str, Any] = {"gate": "softplus", "has_rate": True, "has_dt_bias": True}
    problem = Problem(
        "mamba2", K=32, V=24, dtype="fp32", final_state=True, has_D=True, **given | fields
    )
    generated(tmp_path / "made", Recipe.default(problem))
    done = _own_test(tmp_path, as_it_is=True)
    assert done.returncode == 0, done.stderr
    found = {x.split()[0] for x in done.stdout.splitlines()}
    assert {"o", "final_state", "dq", "ddt", "drate", "ddt_bias", "dD"} <= found
    assert ("dz" in found, "dinitial_state" in found) == (not problem.varlen,) * 2
    shown = (tmp_path / "made/__init__.py").read_text()
    assert "S_t = exp(rate dt_t) S_{t-1} + dt_t k_t v_t^T" in shown and "scale" not in shown
    assert "rate is A" in (tmp_path / "made/README.md").read_text()


def test_what_a_package_of_mamba2_was_not_made_for_is_refused(tmp_path: Path) -> None:
    problem = Problem("mamba2", K=16, V=16, dtype="fp32")
    shape = Shape("small", 1, 20, 2, groups=1)
    generated(tmp_path / "made", Recipe.default(problem))
    extra = {"D": torch.ones(2, 16), "z": torch.ones(1, 20, 2, 16), "rate": -torch.ones(2)}
    calls = [_call(problem, shape, **{name: x}) for name, x in extra.items()]
    calls.append(_call(problem, shape, use_gate_in_kernel=True))
    found = _run(tmp_path, [("made", calls)])
    for answer, words in zip(found, ("D", "z", "rate", "use_gate_in_kernel"), strict=True):
        kind, message = answer
        assert kind == "ValueError" and f"these kernels were made for {words}=" in message
    assert [x[1].split("generate` with ")[-1] for x in found] == [
        "--with D", "--with z", "--with rate", "--gate softplus"
    ]  # fmt: skip


def _own_test(folder: Path, *, as_it_is: bool = False) -> subprocess.CompletedProcess[str]:
    """`as_it_is`: as a user runs it, in a process of its own."""
    if not as_it_is:
        return ask(folder)
    env = os.environ | {"TRITON_INTERPRET": "1"}
    env.pop("PYTHONPATH", None)
    words = [sys.executable, "-W", "ignore", "-m", "made.test_kernels"]
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_its_own_test_says_where_it_runs(tmp_path: Path, dtype: str) -> None:
    """Without a GPU it ended in a traceback."""
    generated(tmp_path / "made", Recipe.default(replace(PLAIN, dtype=dtype)))
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    env = {x: y for x, y in env.items() if x not in ("PYTHONPATH", "TRITON_INTERPRET")}
    words = [sys.executable, "-W", "error", "-m", "made.test_kernels"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    elsewhere = (
        "; with TRITON_INTERPRET=1" if dtype == "fp32" else ", and bf16 kernels run on nothing"
    )
    assert done.stderr.startswith(f"no GPU{elsewhere}") and done.stderr.count("\n") == 1


def test_an_earlier_package_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    generated(folder, Recipe.default(PLAIN, "fast"))
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__/scan.cpython-313.pyc").write_bytes(b"")
    (folder / ".scan.py.a1b2c3d4").write_text("# what a kill left before")
    files = generated(folder, Recipe.default(PLAIN, "lean"))
    assert {*folder.iterdir()} == {*files}
    assert [x.name for x in tmp_path.iterdir()] == ["made"]
    found = folder.stat()
    generated(folder, Recipe.default(PLAIN, "lean"))  # nothing to do
    assert folder.stat().st_ino == found.st_ino


@pytest.mark.parametrize("name", ["notes.txt", "scan.py", ".hidden", "data"])
def test_files_of_others_are_never_overwritten(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    if name == "data":
        (folder / name).mkdir()
    else:
        (folder / name).write_text("mine")
    with pytest.raises(InputError, match=rf"{name}.*choose a new or empty folder"):
        generated(folder, Recipe.default(PLAIN))
    assert [x.name for x in folder.iterdir()] == [name]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_of_others_survive_force(tmp_path: Path) -> None:
    generated(tmp_path / "made", Recipe.default(PLAIN))
    (tmp_path / "made/notes.txt").write_text("mine")
    (tmp_path / "made/__pycache__").mkdir()
    (tmp_path / "made/__pycache__/notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"did not write \(__pycache__, notes.txt\)"):
        generated(tmp_path / "made", Recipe.default(PLAIN, "fast"), force=True)
    assert (tmp_path / "made/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("edit", ["comment", "last line", "no last line"])
def test_edited_files_are_kept_without_force(tmp_path: Path, edit: str) -> None:
    folder = tmp_path / "made"
    generated(folder, Recipe.default(PLAIN))
    scan = folder / "scan.py"
    text = scan.read_text()
    edits = {
        "comment": text.replace("import triton\n", "import triton  # mine\n", 1),
        "last line": f"{text}# mine\n",
        "no last line": text[: text.rindex("# as generated")],  # as an earlier gdn2gen left it
    }
    assert edits[edit] != text
    scan.write_text(edits[edit])
    before = _bytes(folder)
    for plan in ("lean", "fast"):
        with pytest.raises(InputError, match=r"edited.*\(scan.py\).*--force"):
            generated(folder, Recipe.default(PLAIN, plan))
        assert _bytes(folder) == before
    generated(folder, Recipe.default(PLAIN, "fast"), force=True)
    generated(tmp_path / "new", Recipe.default(PLAIN, "fast"))
    assert _bytes(folder) == _bytes(tmp_path / "new")


def test_the_command_asks_for_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages, "is_proven", lambda _: True)  # 15 s each time
    command = ["generate", "--head-dim", "64", "--target", "sm_90", "--out", str(tmp_path / "made")]
    assert program.main(command) == 0
    before = _bytes(tmp_path / "made")
    (tmp_path / "made/forward.py").write_text(
        (tmp_path / "made/forward.py").read_text() + "# mine\n"
    )
    assert program.main(command) == 2
    assert "(forward.py)" in capsys.readouterr().err
    assert program.main([*command, "--force"]) == 0
    assert _bytes(tmp_path / "made") == before


# Writes a package, and kills itself at the given call of what changes the file system.
_KILLED = """
import json, os, signal, sys
from pathlib import Path
from gdn2gen.codegen import _package_files

texts, folder, at = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), int(sys.argv[3])
if sys.argv[4] == "False":
    _package_files._renamed_at_one_stroke = lambda *_: False
calls = 0

def watch(owner, name):
    was = getattr(owner, name)
    def watched(*args, **options):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return was(*args, **options)
    setattr(owner, name, watched)

for owner, name in [(os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "open"),
                    (Path, "rename"), (Path, "mkdir"), (Path, "chmod"),
                    (_package_files, "_renamed_at_one_stroke")]:
    watch(owner, name)
_package_files.write_package(folder, texts)
"""


@pytest.mark.parametrize("one_stroke", [True, False])
def test_a_kill_leaves_the_old_package_or_the_new_one(tmp_path: Path, one_stroke: bool) -> None:
    made, new, texts = tmp_path / "here/made", tmp_path / "new", tmp_path / "texts"
    fast = Recipe.default(PLAIN, "fast")
    texts.write_text(json.dumps(package_texts(fast, command_of(fast))))
    made.parent.mkdir()
    generated(new, fast)
    generated(made, Recipe.default(PLAIN))
    old, wanted = _bytes(made), _bytes(new)
    seen, returncode, at = set(), -9, 0
    while returncode:
        at += 5  # of some 60 calls; another each time
        command = [sys.executable, "-c", _KILLED, str(texts), str(made), str(at), str(one_stroke)]
        returncode = subprocess.run(command, check=False).returncode
        assert returncode in (0, -9)
        if made.exists() or one_stroke:
            assert _bytes(made) in (old, wanted)
            seen.add(_bytes(made) == wanted)
        generated(made, Recipe.default(PLAIN))  # what was left is in nobody's way
        assert _bytes(made) == old
        assert [x.name for x in made.parent.iterdir()] == ["made"]
    assert seen == {True, False}


def test_a_kill_between_two_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two folders cannot change places, the old one is put back by the next run."""
    made = tmp_path / "made"
    generated(made, Recipe.default(PLAIN))
    old = _bytes(made)
    made.rename(tmp_path / f".made.{'0' * 16}.old")
    (tmp_path / f".made.{'1' * 16}.new").mkdir()
    (tmp_path / ".made.old").mkdir()  # a user's
    (tmp_path / f".made.{'0' * 16}.old/scan.py").write_text("# mine")
    with pytest.raises(InputError, match=r"scan\.py"):
        generated(made, Recipe.default(PLAIN, "fast"))
    assert _bytes(made) == old | {"scan.py": b"# mine"}
    assert sorted(x.name for x in tmp_path.iterdir()) == [".made.old", "made"]


def test_what_is_written_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, written = tmp_path / "made", _package_files.replace_file
    generated(made, Recipe.default(PLAIN))

    def slow(path: Path, text: str) -> None:
        written(path, text)
        (made / "scan.py").write_text("mine")

    monkeypatch.setattr(_package_files, "replace_file", slow)
    with pytest.raises(FileError, match="written to while") as raised:
        generated(made, Recipe.default(PLAIN, "fast"))
    (kept,) = [x for x in tmp_path.iterdir() if x.name.endswith(".kept")]
    assert str(kept) in str(raised.value)
    assert (kept / "scan.py").read_text() == "mine"


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    files = generated(tmp_path / "link", Recipe.default(PLAIN))
    assert os.readlink(tmp_path / "link") == "there"
    assert {x.name for x in files} == {x.name for x in (tmp_path / "there").iterdir()}


def test_permissions_stay(tmp_path: Path) -> None:
    made = tmp_path / "made"
    generated(made, Recipe.default(PLAIN))
    made.chmod(0o750)
    (made / "scan.py").chmod(0o600)
    generated(made, Recipe.default(PLAIN, "fast"))
    assert made.stat().st_mode & 0o777 == 0o750
    assert (made / "scan.py").stat().st_mode & 0o777 == 0o600
    assert (made / "sum_decay.py").stat().st_mode & 0o077 == 0o044 & ~_umask()


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def test_the_folder_that_a_shell_is_in_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made/deeper").mkdir(parents=True)
    for folder, given in ((tmp_path / "made", "."), (tmp_path / "made/deeper", "..")):
        monkeypatch.chdir(folder)
        with pytest.raises(FileError, match="is the folder that this runs in"):
            generated(given, Recipe.default(PLAIN))
    with pytest.raises(FileError, match="is a mount point"):
        generated("/proc", Recipe.default(PLAIN))


def test_a_package_mixed_from_two_is_refused_at_import(tmp_path: Path) -> None:
    """It ran, and wrote past the end of its buffers."""
    short = Recipe.default(PLAIN)
    assert short.BT != 16
    generated(tmp_path / "one", short)
    generated(tmp_path / "two", Recipe.default(PLAIN, BT=16))
    for name in ("one", "two"):
        shutil.copytree(tmp_path / name, tmp_path / f"all_of_{name}")
    shutil.copy(tmp_path / "two/scan.py", tmp_path / "one/scan.py")
    edited = tmp_path / "two/scan.py"
    edited.write_text(edited.read_text().replace("import triton\n", "import triton  # mine\n", 1))
    (tmp_path / "child.py").write_text(
        "import importlib, sys\nsys.modules['gdn2gen'] = None\n"
        "for name in ('all_of_one', 'all_of_two', 'two', 'one'):\n"
        "    importlib.import_module(name)\n    print(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "child.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["all_of_one", "all_of_two", "two"]
    assert "ImportError: scan.py and __init__.py of one were generated for" in done.stderr


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """And not the hidden one beside it that is made first."""
    with pytest.raises(FileError, match=r"^/proc/package cannot be written .*into /proc;") as it:
        _package_files.write_package(Path("/proc/package"), {"__init__.py": ""})
    assert ".new" not in str(it.value)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "made").write_text("mine")
    with pytest.raises(InputError, match="is not a folder"):
        generated(tmp_path / "made", Recipe.default(PLAIN))
    assert (tmp_path / "made").read_text() == "mine"


def test_a_config_that_does_not_fit_leaves_the_folder_alone(tmp_path: Path) -> None:
    recipe = Recipe.default(PLAIN)
    wide = recipe.with_config(default_config("grad_key", Problem()))
    with pytest.raises(ValueError, match="exceeds"):
        generated(tmp_path / "made", wide)
    assert not (tmp_path / "made").exists()


def test_the_command_writes_a_package_and_the_package_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import re
    import shlex

    monkeypatch.setattr(packages, "is_proven", lambda _: True)  # 15 s each time
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path / "tuned"))
    monkeypatch.delenv("GDN2GEN_STRICT", raising=False)
    given = "generate --head-dim 64,32 --dtype fp16 --no-l2norm --gate sigmoid --with varlen"
    given += " --shape 1x4096x8 --target sm_80 --level fast"
    assert program.main([*given.split(), "--out", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert "sum_decay.py" in shown
    assert "need torch and triton but not gdn2gen" in shown
    source = (tmp_path / "a/__init__.py").read_text()
    (command,) = re.findall(r"made by\n    gdn2gen (generate (?:.*\\\n)*.*)", source)
    words = shlex.split(command.replace("\\\n", ""))
    again = [str(tmp_path / "b") if word == "DIR" else word for word in words]
    assert program.main(again) == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
