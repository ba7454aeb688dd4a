"""The workflows as functions: what they return, and that commands call them."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gdn2gen
from gdn2gen.base.device import named_device
from gdn2gen.base.errors import DeviceError, DispatchError, InputError
from gdn2gen.cli import program
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import SHAPES
from gdn2gen.store.dispatch import find_recipe
from gdn2gen.workflows import compiled

H200 = named_device("H200")


def test_a_process_that_was_warmed_up_loads_nothing_more(interpreter: Callable[..., Any]) -> None:
    assert interpreter("warmup_checks:nothing_is_loaded_after") == [
        ("chunk_kda", "2x20x2", "lean"),
        ("chunk_kda", "2x20x2", "fast"),
        ("chunk_kda", "2x20x2", "lean"),
        ("fused_recurrent_kda", "3x1x2", None),
        ("fused_recurrent_kda", "2x2x2", None),
    ]


def test_decoding_is_warmed_up_as_asked(interpreter: Callable[..., Any]) -> None:
    interpreter("warmup_checks:decoding_is_as_asked")


@pytest.mark.parametrize("workers", ["2", 0, True, 1.5])
def test_workers_are_a_number_of_processes(workers: Any) -> None:
    with pytest.raises(InputError, match="workers must be an int of at least 1"):
        gdn2gen.verify(workers=workers)


def test_warming_up_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(DeviceError, match=r"torch sees none here; `gdn2gen compile` needs none"):
        gdn2gen.warmup()


def test_explain_returns_what_calls_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gdn2gen.explain(["train4k", "varlen8k"], target="H200", level="fast")
    assert [x.regime for x in found] == [SHAPES[x].regime for x in ("train4k", "varlen8k")]
    assert [x.recipe.problem.varlen for x in found] == [False, True]
    wanted = find_recipe(Problem(), SHAPES["train4k"].regime, H200, level="fast")
    assert found[0] == wanted and found[0].source == "exact"
    words = {"target": "H200", "gate": "sigmoid", "bound": 2}
    (apart,) = gdn2gen.explain(SHAPES["train4k"], **words)
    assert apart.gate_apart == "sigmoid of fp32" and apart.recipe.problem == Problem()
    monkeypatch.setenv("GDN2GEN_GATE_APART", "0")
    gated = gdn2gen.explain(SHAPES["train4k"], **words)
    assert gated[0].recipe.problem.bound == 2
    with pytest.raises(DispatchError, match="strict mode"):
        gdn2gen.explain("2x77x5", target="H200", strict=True)
    with pytest.raises(InputError, match="unknown shape 'train5k'"):
        gdn2gen.explain("train5k")


@pytest.mark.parametrize("op", ["gdn2", "mamba3"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"device": "H200"}, "no keyword 'device' is taken, for a GPU is named by target"),
        ({"K": 64}, "no keyword 'K' is taken, which is called head_dim here"),
        ({"sauce": 1}, r"no keyword 'sauce' is taken; .* are the fields of \w*Problem: .*gate"),
    ],
)
def test_unknown_keywords_are_refused_with_those_that_there_are(
    op: str, given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        gdn2gen.explain(op=op, **given)
    with pytest.raises(InputError, match=said):
        gdn2gen.generate(tmp_path / "made", op=op, **given)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("op", ["gdn2", "mamba2", "mamba3"])
def test_what_is_found_is_printed_as_the_command_prints_it(
    op: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shape = "train4k" if op == "gdn2" else "mamba4k"
    given = {"has_dt_bias": True, "has_rate": True, "has_D": True, "has_z": True}
    gate: dict[str, Any] = {"gate": "softplus", **given} if op == "mamba2" else {}
    (found,) = gdn2gen.explain(op=op, value_dim=64, target="H200", **gate)
    for names in ("--shape {} --device", "--shapes {} --target"):
        # as it is without a word
        line = f"explain --op {op} --head-dim 128,64 {names.format(shape)} H200"
        assert program.main(line.split()) == 0
        assert capsys.readouterr().out.splitlines()[1:] == str(found).splitlines()


def test_shapes_are_not_numbers() -> None:
    with pytest.raises(InputError, match=r"or sizes BxTxH such as '4x4096x16', .* but got 4"):
        gdn2gen.explain((4, 4096, 16))  # type: ignore[arg-type]


def test_layers_are_there_without_an_import_of_their_own() -> None:
    code = "import gdn2gen; gdn2gen.nn.GatedDeltaNet2; gdn2gen.ops; "
    code += "gdn2gen.integrations.fla.register; gdn2gen.integrations.mamba.register"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'layers'"):
        _ = gdn2gen.layers


def test_explain_of_mamba3_at_its_levels() -> None:
    options: dict[str, Any] = {"op": "mamba3", "value_dim": 64, "target": "H200"}
    own = gdn2gen.explain("mamba4k", **options)[0]
    assert own.scan is None and "mamba3_gradient" in own.words(100)
    with pytest.raises(DispatchError, match="level must be one of"):
        gdn2gen.explain("mamba4k", level="slow", **options)
    options["dtype"] = "fp32"
    lean, fast = (gdn2gen.explain("mamba4k", level=x, **options)[0] for x in ("lean", "fast"))
    plans = [x.scan.recipe.plan.name for x in (lean, fast)]
    assert plans == ["linear_direct", "linear_direct_states"] and lean.knobs == fast.knobs
    assert "linear_direct_states" in fast.words(100)
    with pytest.raises(DispatchError, match="level must be one of"):
        gdn2gen.explain("mamba4k", level="slow", **options)


def test_mamba3_is_tuned_at_the_levels_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gdn2gen import tuning

    asked: list[Any] = []

    def search(*_: Any, **options: Any) -> Any:
        asked.append(options["levels"])
        return SimpleNamespace(table=lambda: "the scan")

    monkeypatch.setattr(tuning, "tune_without_gpu", search)
    options: dict[str, Any] = {"op": "mamba3", "value_dim": 64, "target": "H200", "dtype": "fp32"}
    gdn2gen.tune("mamba4k", out_dir=tmp_path, **options)
    gdn2gen.tune("mamba4k", out_dir=tmp_path, levels="fast", **options)
    words = ["tune", "--op", "mamba3", "--target", "H200", "--dtype", "fp32", "--out"]
    for level in ("lean", "fast", "both"):
        assert program.main([*words, str(tmp_path), "--level", level]) == 0
    both = ("lean", "fast")
    assert asked == [both, ("fast",), ("lean",), ("fast",), both]


@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_mamba3_is_warmed_up_at_its_levels(backward: bool, interpreter: Callable[..., Any]) -> None:
    assert interpreter("warmup_checks:nothing_of_mamba3_is_loaded_after", backward) == [
        ("mamba3_siso_combined", "1x9x1", "lean"),
        ("mamba3_siso_combined", "1x9x1", "fast"),
        ("mamba3_siso_step", "2x1x1", None),
    ]
    with pytest.raises(InputError, match="leave serving and decode_fields out"):
        gdn2gen.warmup(op="mamba3", serving=True)


def test_verify_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from gdn2gen.measure import suite
    from gdn2gen.measure.case_runs import Result

    asked: list[Any] = []
    bad = Result("a", "check", passed=False, message="off by one")

    def run(*given: Any, **options: Any) -> list[Result]:
        asked.append((given, options))
        return [bad]

    monkeypatch.setattr(suite, "verify", run)
    found = gdn2gen.verify("bf16-*", op="kda", head_dim=64, interpreter=True)
    assert (found.results, found.ok, found.filed_in) == ([bad], False, None)
    options = {"interpreter": True, "op": "kda", "head_dim": (64, 64), "on_result": None}
    options["decays"] = None
    assert asked == [((["bf16-*"],), options | {"workers": None})]


def test_the_command_compiles_what_it_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[Any] = []

    def run(tasks: list[Any], folder: Path, device: Any, *_: Any) -> Any:
        done.extend(tasks)
        return {"scan": 1.0}, "what launches"

    monkeypatch.setattr(compiled, "_run", run)
    words = f"compile --op kda --head-dim 64 --shapes varlen8k --target H200 --out {tmp_path / 'x'}"
    more = "--decode 64x1x16 --decode-with pool,state_bf16 --level both --with final_state"
    assert program.main([*words.split(), *more.split()]) == 0
    stages = [(name, given[1]) for name, given in done if name == "ship_stage"]
    assert {"prepare", "scan", "grad_key", "recurrent"} <= {stage for _, stage in stages}
    assert ("ship_launcher", ()) in done and any(name == "ship_tables" for name, _ in done)
    gradients = [given[0] for _, given in done if given[1:2] == ("grad_key",)]
    assert {x.final_state for x in gradients} == {True, False}
    (decoding,) = [given[0] for _, given in done if given[1:2] == ("recurrent",)]
    assert decoding.one_token and decoding.pool and decoding.state_bf16 and decoding.K == 64
    said = capsys.readouterr().out
    assert f"export GDN2GEN_COMPILED_DIR={tmp_path / 'x'}" in said
    assert "it lacks what launches them: what launches" in said
    recipes = json.loads((tmp_path / "x/compiled.json").read_text())["recipes"]
    assert [x["level"] for x in recipes] == ["lean", "fast"]
    assert program.main([*words.split(), "--decode-with", "pool"]) == program.EXIT_USAGE
    assert "beside --decode, but got pool" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["compile_kernels", "explain", "pin", "tune", "verify", "warmup"])
def test_workflows_are_typed_and_documented(name: str) -> None:
    function = getattr(gdn2gen, name)
    parameters = inspect.signature(function).parameters.values()
    assert all(x.annotation is not inspect.Parameter.empty for x in parameters)
    assert inspect.signature(function).return_annotation not in (inspect.Signature.empty, "Any")
    assert len(inspect.getdoc(function) or "") > 200
