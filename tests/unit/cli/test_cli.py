"""The command line: help, bad arguments, exit codes, and each command without a GPU."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from source_tree import ROOT

from gdn2gen import tuning
from gdn2gen.base import device, environment
from gdn2gen.base.errors import ConfigError, DeviceError, InputError
from gdn2gen.cli import program
from gdn2gen.cli import tune as cli_tune
from gdn2gen.codegen.render import render
from gdn2gen.family.compiled import Compiled
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.parts import (
    ConvolutionProblem,
    DecayGateProblem,
    NormProblem,
    ProjectedNormProblem,
    RotaryProblem,
    SigmoidProblem,
    StreamNormProblem,
    SwigluProblem,
    WindowProblem,
)
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import OPS
from gdn2gen.family.shapes import SHAPES
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.mamba3 import MAMBA3_STAGES
from gdn2gen.kernels.parts import PART_STAGES, PartStage
from gdn2gen.kernels.stream_parts import STREAM_STAGES
from gdn2gen.measure import suite
from gdn2gen.measure.case_runs import Result
from gdn2gen.workflows import tune as workflow

NAMES = [command.name for command in program.COMMANDS]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU, and neither the user's folders nor settings."""
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    monkeypatch.setenv("GDN2GEN_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("GDN2GEN_TUNED_DIR", "GDN2GEN_STRICT", "GDN2GEN_DEBUG"):
        monkeypatch.delenv(name, raising=False)


def _run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gdn2gen", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | env,
        check=False,
    )


# Help and version


ACTIONS = [["tuned", name] for name in ("export", "import", "merge", "diff")]


@pytest.mark.parametrize("words", [[], *([name] for name in NAMES), *ACTIONS], ids=" ".join)
def test_help_has_an_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        program.main([*words, "--help"])
    assert ended.value.code == 0
    (example,) = re.findall(r"Example: (gdn2gen .*)", " ".join(capsys.readouterr().out.split()))
    if words:
        program.build_parser().parse_args(shlex.split(example)[1:])
        assert example.startswith(" ".join(["gdn2gen", *words]))


@pytest.mark.parametrize("command", program.COMMANDS, ids=NAMES)
def test_example_is_understood(command: program.Command) -> None:
    called, name, *options = shlex.split(command.example)
    assert (called, name) == ("gdn2gen", command.name)
    assert program.build_parser().parse_args([name, *options]).command == name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        program.main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"gdn2gen \d+\.\d+\.\d+\n", capsys.readouterr().out)


# Bad arguments


@pytest.mark.parametrize(
    "words",
    [
        "",
        "tuen",
        "tune --budget 0",
        "tune --budget inf",
        "tune --budget soon",
        "tune --dtype int8",
        "tune --level slow",
        "tune --op mamba",
        "generate --stage nothing",
        "bench --vs torch",
    ],
)
def test_usage_errors_exit_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        program.main(words.split())
    assert ended.value.code == program.EXIT_USAGE
    assert "usage: gdn2gen" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("explain --head-dim 100", "K=100"),
        ("explain --head-dim 128,7", "V=7"),
        ("explain --head-dim 1,2,3", "'1,2,3'"),
        ("explain --head-dim wide", "'wide'"),
        ("explain --shape train5k", "train5k"),
        ("explain --device H2000", "H2000"),
        ("explain --strict --shape 3x77x5", "strict"),
        ("explain --with sauce", "'sauce'"),
        (
            "explain --op gla --gate softplus",
            "gla has no gate in its kernels, so that gate must be",
        ),
        ("explain --op mamba3 --head-dim 100,64", "a multiple of 8 from 16 to 256, but got 100"),
        ("explain --with dt_bias", "use_gate_in_kernel"),
        ("explain --with beta_sigmoid", "gdn2 has no beta"),
        ("explain --op kda --with neg_eigval", "needs beta_sigmoid"),
        ("explain --with beta_fp32", "gdn2 has no beta that could be fp32"),
        ("explain --op kda --dtype fp32 --with beta_fp32", "dtype='fp32'; leave it out"),
        ("tuned export --op kda --device L4", "nothing is tuned for kda on NVIDIA L4"),
        ("tune --shapes ,", "no shape is named in ','"),
        ("tune --target sm_1", "sm_1"),
        ("tune --storage sqlite:///x.db", "--storage"),
        ("generate", "--out"),
        ("generate --out x --config BT=64", "--stage"),
        ("generate --out x --shape train4k,wide8k", "one shape"),
        ("generate --stage scan --config BT=7", "BT"),
        ("generate --stage scan --config BT", "'BT'"),
        ("generate --stage scan --config XY=64", "XY"),
        ("generate --stage scan --head-dim 32 --config BV=128", "BV=128"),
        ("verify no-such-case", "'no-such-case'; there are "),
        ("verify bf16-layer --interpreter", "bf16-layer"),
    ],
)
def test_bad_values_are_one_line_and_exit_2(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(words.split()) == program.EXIT_USAGE
    error = capsys.readouterr().err
    assert error.startswith(f"gdn2gen {words.split()[0]}: ")
    assert said in error
    assert "Traceback" not in error


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDN2GEN_DEBUG", "1")
    with pytest.raises(InputError):
        program.main(["explain", "--shape", "train5k"])


def test_files_that_cannot_be_written_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(suite, "verify", lambda *_, **__: [])
    path = tmp_path / "file" / "results.json"
    words = ["verify", "small-fp32-layer", "--interpreter", "--json", str(path)]
    assert program.main(words) == program.EXIT_USAGE
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_bench_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> None:
        raise DeviceError("no GPU is present")

    monkeypatch.setattr(device, "present_device", absent)
    assert program.main(["bench"]) == program.EXIT_USAGE
    assert "no GPU is present" in capsys.readouterr().err


# Explain


@pytest.mark.parametrize("name", ["H200", "sm_90", "rtx 4090", "sm_120"])
def test_explain_for_a_named_device(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["explain", "--shape", "train4k", "--device", name]) == 0
    shown = capsys.readouterr().out
    assert device.named_device(name).name in shown
    for word in ("plan", "lean", "prepare", "grad_", "source", "why"):
        assert word in shown


def test_explain_takes_several_shapes_and_levels(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explain", "--shape", "varlen8k,2x100x3", "--level", "fast", "--gate", "softplus"]
    assert program.main([*words, "--device", "sm_80"]) == 0
    shown = capsys.readouterr().out
    assert "varlen8k on sm_80" in shown
    assert "2x100x3 on sm_80" in shown
    assert "fast" in shown
    assert "reprepare" not in shown, "the fast plan keeps the factors"


def test_explain_without_a_gpu_imports_no_tuner() -> None:
    program = (
        "import sys; from gdn2gen.cli.program import main; "
        "code = main(['explain', '--device', 'H200']); "
        "print(sorted({'optuna', 'tilelang'} & {*sys.modules})); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_damaged_tuned_file_is_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "gdn2" / "nvidia-h200.json"
    file.parent.mkdir()
    file.write_text('{"_metadata": {"schema": 1, ')
    done = _run("explain", "--device", "H200", GDN2GEN_TUNED_DIR=str(tmp_path))
    assert done.returncode == 0
    assert done.stderr.startswith("warning: ")
    assert str(file) in done.stderr
    assert file.read_text() == '{"_metadata": {"schema": 1, '


# Generate


def test_generate_prints_the_rendered_stage(capsys: pytest.CaptureFixture[str]) -> None:
    problem = Problem(K=64, V=32, dtype="fp16")
    words = ["generate", "--stage", "scan", "--head-dim", "64,32", "--dtype", "fp16", "--config"]
    assert program.main([*words, "BT=32 num_warps=8"]) == 0
    config = default_config("scan", problem).replace(BT=32, num_warps=8)
    assert capsys.readouterr().out == render(problem, "scan", config).source


@pytest.mark.parametrize(
    "problem",
    [
        Problem(K=64, V=128),
        Problem(gate="softplus", has_A_log=True, has_dt_bias=True, l2norm=False),
        Problem(gate="sigmoid", gate_dtype="bf16", varlen=True, initial_state=True),
        Problem("kda", beta_sigmoid=True, neg_eigval=True, final_state=True),
        Problem("kda", beta_fp32=True, varlen=True),
    ],
    ids=["plain", "softplus", "sigmoid", "kda", "kda-beta-fp32"],
)
def test_the_command_in_a_kernel_regenerates_it(
    problem: Problem, capsys: pytest.CaptureFixture[str]
) -> None:
    _regenerates(problem, "prepare", capsys)


@pytest.mark.parametrize(
    "stage", [*PART_STAGES, *STREAM_STAGES, *MAMBA3_STAGES], ids=lambda x: x.name
)
def test_the_command_in_a_kernel_of_a_layer_regenerates_it(
    stage: PartStage, capsys: pytest.CaptureFixture[str]
) -> None:
    others = {
        ConvolutionProblem: ConvolutionProblem(width=3, bias=True, packed=True, dtype="fp16"),
        NormProblem: NormProblem(size=96, activation="silu", weight_dtype="fp32"),
        DecayGateProblem: DecayGateProblem(size=96, gate="sigmoid", dtype="fp16"),
        StreamNormProblem: StreamNormProblem(size=96, added=True, stream_dtype="bf16"),
        SwigluProblem: SwigluProblem(dtype="fp16"),
        SigmoidProblem: SigmoidProblem(dtype="fp32"),
        ProjectedNormProblem: ProjectedNormProblem(size=64, rank=32, bias=True),
        RotaryProblem: RotaryProblem(size=24, dtype="fp32"),
        WindowProblem: WindowProblem(size=40),
        Mamba3Problem: Mamba3Problem(
            state_size=80,
            head_dim=48,
            angles=7,
            trap_dtype="bf16",
            skip=True,
            packed=True,
        ),
    }
    for problem in (stage.made_for(), others[stage.made_for]):
        _regenerates(problem, stage.name, capsys)


@pytest.mark.parametrize(
    ("extras", "said"),
    [("width", "'width'"), ("bias:1", "'bias:1'"), ("state_bf16", "'state_bf16'"),
     ("width:5", "width must be one of 2, 3, 4, but got 5")],
)  # fmt: skip
def test_fields_that_a_layers_kernel_has_not(
    extras: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["generate", "--stage", "short_conv", "--with", extras]) == 2
    assert said in capsys.readouterr().err


def _regenerates(problem: Compiled, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = render(problem, stage, default_config(stage, problem)).source
    (command,) = re.findall(r"gdn2gen (generate [^\\\n]*(?:\\\n[^\\\n]*)*)", source)
    command = command.replace("\\\n", " ")
    assert program.main(shlex.split(command)) == 0
    assert capsys.readouterr().out == source


def test_generate_reports_resources_for_a_target(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gdn2gen.codegen import build

    used = build.Resources(registers=97, spill_bytes=0, shared_bytes=4096, threads=128, seconds=1.5)
    monkeypatch.setattr(build, "compile_ahead", lambda *_: used)
    assert program.main(["generate", "--stage", "scan", "--target", "sm_80"]) == 0
    assert "scan for sm_80: 97 registers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    ["--stage scan --target sm_90", "--head-dim 24 --target sm_90", "--target sm_90",
     "--op mamba3 --target sm_90"],
)  # fmt: skip
def test_nothing_is_compiled_or_written_for_a_gpu_as_the_interpreter_takes_it(
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = [] if "--stage" in words else ["--out", str(tmp_path / "made")]
    assert program.main(["generate", *words.split(), *out]) == program.EXIT_USAGE
    assert "TRITON_INTERPRET=1 has kernels made for Triton's interpreter" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_reader_that_goes_is_no_error() -> None:
    line = f"{sys.executable} -m gdn2gen generate --stage grad_key | head -n 1"
    script = f"set -o pipefail; {line}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1


def test_config_words() -> None:
    from gdn2gen.cli.inspect import parse_config

    problem = Problem()
    expected = default_config("prepare", problem).replace(BT=32, solve="ieee")
    assert parse_config("prepare", "solve=ieee, BT=32", problem) == expected
    with pytest.raises(ConfigError, match="KNOB=VALUE"):
        parse_config("prepare", "solve=", problem)


def test_a_kernel_that_the_target_cannot_run_is_refused_in_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is printed, and not by what ptxas says of an instruction."""
    words = ["generate", "--stage", "scan", "--target", "sm_80", "--config", "pdl=wait"]
    assert program.main(words) != 0
    out, err = capsys.readouterr()
    assert not out and "cannot serve this problem on sm_80: pdl=wait" in err


# Tune and quick, with a fake tuner


class FakeTuner:
    """Keeps what it was asked, and answers with a report of nothing."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.all_asked: list[dict[str, Any]] = []

    def __call__(self, *, problem: Any, shapes: Any, device: Any, **options: Any) -> Any:
        self.asked = {"problem": problem, "shapes": shapes, "device": device, **options}
        self.all_asked.append(self.asked)
        result = SimpleNamespace(shape=shapes[0])
        return SimpleNamespace(
            problem=problem, device=device, results=[result], table=lambda: "the report"
        )


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> FakeTuner:
    fake = FakeTuner()
    monkeypatch.setattr(tuning, "tune_without_gpu", fake, raising=False)
    return fake


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> FakeTuner:
    fake, gpu = FakeTuner(), device.named_device("H200")
    monkeypatch.setattr(tuning, "tune", fake, raising=False)
    monkeypatch.setattr(cli_tune, "present_or_target", lambda _: (gpu, True))
    monkeypatch.setattr(workflow, "present_or", lambda _: (gpu, True))
    return fake


def test_tune_on_a_gpu(present: FakeTuner, tmp_path: Path) -> None:
    words = "tune --head-dim 64,128 --shapes train4k,2x300x4 --dtype fp16 --gate sigmoid --level"
    options = ["both", "--budget", "7.5", "--out", str(tmp_path), "--storage", "sqlite:///x"]
    assert program.main([*words.split(), *options]) == 0
    asked = present.asked
    assert asked["problem"] == Problem(
        K=64, V=128, dtype="fp16", gate="sigmoid", has_A_log=True, has_dt_bias=True
    )
    assert [shape.name for shape in asked["shapes"]] == ["train4k", "2x300x4"]
    assert asked["device"] == device.named_device("H200")
    assert asked["budget_minutes"] == 7.5
    assert asked["out_dir"] == tmp_path
    assert asked["storage"] == "sqlite:///x"
    assert asked["levels"] == ("lean", "fast")


def test_tune_for_a_bound(present: FakeTuner, tmp_path: Path) -> None:
    words = ["tune", "--head-dim", "64", "--gate", "sigmoid", "--lower-bound", "-2"]
    assert program.main([*words, "--out", str(tmp_path)]) == 0
    assert present.asked["problem"] == Problem(
        K=64, V=64, gate="sigmoid", has_A_log=True, has_dt_bias=True, bound=2
    )


def test_tune_with_no_further_word(
    present: FakeTuner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["tune", "--out", str(tmp_path)]) == 0
    asked = present.all_asked
    assert [x["problem"] for x in asked] == [Problem(K=128, V=128), Problem(K=64, V=64)]
    assert [x["shapes"] for x in asked] == [list(SHAPES.values())] * 2
    assert [x["budget_minutes"] for x in asked] == pytest.approx([5.0, 10.0], abs=0.1)
    assert "head dim 64 (2 of 2)" in capsys.readouterr().out


def test_tune_for_a_target(
    absent: FakeTuner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tune", "--target", "sm_120", "--level", "fast", "--out", str(tmp_path)]
    assert program.main(words) == 0
    assert absent.asked["device"] == device.named_device("sm_120")
    assert absent.asked["levels"] == ("fast",)
    shown = capsys.readouterr().out
    assert "Nothing is timed" in shown
    assert "predicted" in shown
    assert f"export GDN2GEN_TUNED_DIR={tmp_path}" in shown


def test_tune_writes_where_it_is_looked_for(
    absent: FakeTuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert program.main(["tune"]) == 0
    assert absent.asked["out_dir"] == ROOT / "tuned", "of the source tree"
    monkeypatch.setattr(workflow, "in_source_tree", lambda: False)
    assert program.main(["tune"]) == 0
    assert absent.asked["out_dir"] == tmp_path / "cache" / "tuned"
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path / "mine"))
    assert program.main(["tune"]) == 0
    assert absent.asked["out_dir"] == tmp_path / "mine"


def test_quick_without_a_gpu_says_so(
    absent: FakeTuner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["quick"]) == 0
    assert absent.asked["device"] == device.named_device("sm_90")
    assert absent.asked["budget_minutes"] == 3
    assert absent.asked["shapes"] == [SHAPES["train4k"]]
    assert absent.asked["out_dir"] == tmp_path / "cache" / "tuned", "never the package's folder"
    shown = capsys.readouterr().out
    assert "Without a GPU, for the target sm_90" in shown
    assert "the report" in shown
    assert "What a call at train4k runs" in shown


def test_quick_with_a_gpu(present: FakeTuner, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["quick", "--budget", "1"]) == 0
    assert present.asked["levels"] == ("lean",)
    assert present.asked["storage"] is None
    assert "Without a GPU" not in capsys.readouterr().out


def test_interrupt_says_that_the_study_resumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "tune_without_gpu", interrupted, raising=False)
    assert program.main(["tune"]) == program.EXIT_INTERRUPTED == 130
    assert "resumes the study" in capsys.readouterr().err


def test_interrupt_of_the_real_tuner(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gdn2gen", "tune", "--target", "sm_90", "--out", str(tmp_path)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        # a shell's jobs in the background, a test run among them, are started deaf to it
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    started = process.stderr.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=60)
    assert process.returncode == program.EXIT_INTERRUPTED, started + words
    assert "Traceback" not in words
    assert not [*tmp_path.rglob("*.json")]


# Verify and bench


def test_verify_lists_its_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["verify", "--list", "small-fp16-*"]) == 0
    names = capsys.readouterr().out.split()
    assert names
    assert all(name.startswith("small-fp16-") for name in names)


def test_verify_runs_in_the_interpreter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "results.json"
    assert program.main(["verify", "small-fp32-one-token", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "interpreter" in shown
    assert "1 of 1 cases passed" in shown
    (result,) = json.loads(path.read_text())["results"]
    assert result["passed"]
    assert {"o", "final_state", "dq", "dg", "dinitial_state"} <= {*result["errors"]}


def test_verify_fails_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Result("small-fp32-layer", "accuracy", False, {"dq": 0.5}, 1e-4, "dq is off")
    good = replace(bad, passed=True, errors={"dq": 1e-6}, message="")
    monkeypatch.setattr(suite, "verify", lambda *_, **__: [good, bad])
    assert program.main(["verify", "small-fp32-layer"]) == 1
    shown = capsys.readouterr().out
    assert "small-fp32-layer: dq is off" in shown
    assert "1 of 2 cases passed" in shown


@pytest.mark.parametrize("failing", ["", "K72-V72-fp16-zero"])
def test_verify_on_a_gpu_files_what_has_passed(
    failing: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from gdn2gen.measure import suite
    from gdn2gen.store import verified

    def fake(patterns: Any, **options: Any) -> list[Result]:
        del options["on_result"]
        assert options.pop("workers") is None
        cases = suite.select_cases(patterns, **options)
        return [Result(x.name, x.check, passed=x.name != failing) for x in cases]

    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path))
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device, "present_device", lambda: device.named_device("RTX-4090"))
    monkeypatch.setattr(suite, "verify", fake)
    code = program.main(["verify", "--op", "gdn2", "--head-dim", "72"])
    shown = capsys.readouterr().out
    assert code == int(bool(failing))
    for dtype in ("bf16", "fp16", "fp32"):
        passed = dtype not in failing
        assert verified.is_verified("gdn2", dtype, 72, 72, "sm_89") == passed
        assert (f"verified: gdn2 at K=72, V=72 in {dtype}" in shown) == passed
    # a part of the suite says nothing of the whole
    assert program.main(["verify", "--op", "gdn2", "--head-dim", "80", "*-layer"]) == 0
    assert not verified.is_verified("gdn2", "bf16", 80, 80, "sm_89")
    verified.look_anew()


def test_bench_of_every_member(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each at its own sizes, beside the peer that has it; one that fails leaves the others."""
    from gdn2gen.measure import mamba3_rows, peers, results, rows

    asked: dict[str, Any] = {}

    def fake(op: str, shapes: Any, K: int, V: int, dtype: str, **options: Any) -> list[Any]:
        if op == "gla":
            raise DeviceError("it hangs")
        asked[op] = (shapes[0].name, K, V, options["vs"], options["gate"])
        return [op]

    def fake_mamba3(shapes: Any, K: int, V: int, dtype: str, **options: Any) -> list[Any]:
        asked["mamba3"] = (shapes[0].name, K, V, options["vs"])
        return ["mamba3"]

    def any_peer(op: str, level: str) -> tuple[str | None, str]:
        return (None, "kda is measured alone") if op == "kda" else (f"peer of {op}", "")

    monkeypatch.setattr(device, "present_device", lambda: device.named_device("H200"))
    monkeypatch.setattr(rows, "bench_shapes", fake)
    monkeypatch.setattr(mamba3_rows, "bench_mamba3", fake_mamba3)
    monkeypatch.setattr(peers, "any_peer", any_peer)
    monkeypatch.setattr(results, "rows_table", lambda found: f"table of {found}")
    monkeypatch.setattr(results, "rows_document", lambda found: {"rows": found})
    file = tmp_path / "rows.json"
    assert program.main(["bench", "--op", "all", "--vs", "any", "--json", str(file)]) == 1
    assert asked["mamba3"] == ("mamba4k", 128, 64, "peer of mamba3")
    assert asked["mamba2"] == ("mamba4k", 128, 64, "peer of mamba2", "softplus")
    assert asked["kda"] == ("train4k", 128, 128, None, "none")
    assert {*asked} == {*OPS, "mamba3"} - {"gla"}
    shown = capsys.readouterr().out
    assert "gla is left out: it hangs" in shown and "kda is measured alone" in shown
    assert json.loads(file.read_text())["rows"] == [*asked]
    for words in ("--op all --gate softplus", "--op mamba3 --gate softplus"):
        assert program.main(["bench", *words.split()]) == 2


@pytest.mark.parametrize(("op", "module"), [("gla", "rows"), ("mamba3", "mamba3_rows")])
def test_bench_at_both_levels(
    op: str, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from gdn2gen.measure import results

    def fake(*_: Any, **options: Any) -> list[Any]:
        return [options["level"]]

    name = {"rows": "bench_shapes", "mamba3_rows": "bench_mamba3"}[module]
    monkeypatch.setattr(device, "present_device", lambda: device.named_device("H200"))
    monkeypatch.setattr(f"gdn2gen.measure.{module}.{name}", fake)
    monkeypatch.setattr(results, "rows_table", lambda found: f"table of {found}")
    monkeypatch.setattr(results, "rows_document", lambda found: {"rows": found})
    file = tmp_path / "rows.json"
    for level, rows in (("both", ["lean", "fast"]), ("fast", ["fast"]), ("lean", ["lean"])):
        words = ["bench", "--op", op, "--shapes", "2x64x2", "--level", level, "--json", str(file)]
        assert program.main(words) == 0
        assert json.loads(file.read_text())["rows"] == rows
        shown = capsys.readouterr().out
        assert all(f"level {x}" in shown and f"table of ['{x}']" in shown for x in rows)


@pytest.mark.parametrize("level", ["lean", "fast"])
def test_explain_of_mamba3_at_a_level(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"explain --op mamba3 --shape mamba4k --device H200 --json --level {level}"
    assert program.main(words.split()) == 0
    assert "mamba3_gradient" in json.loads(capsys.readouterr().out)["kernels"]
    assert program.main([*words.split(), "--dtype", "fp32"]) == 0
    scan = json.loads(capsys.readouterr().out)["scan"]
    plan = {"lean": "linear_direct", "fast": "linear_direct_states"}[level]
    assert (scan["level"], scan["plan"]) == (level, plan)


def test_bench_asks_for_what_was_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gdn2gen.measure import results, rows

    asked: dict[str, Any] = {}

    def fake(op: str, shapes: Any, K: int, V: int, dtype: str, **options: Any) -> list[Any]:
        asked.update(op=op, shapes=shapes, K=K, V=V, dtype=dtype, **options)
        assert environment.unverified() == environment.VERIFYING
        options["on_row"](SimpleNamespace(shape=shapes[0]))
        return []

    saved: list[Path] = []
    monkeypatch.setattr(device, "present_device", lambda: device.named_device("H200"))
    monkeypatch.setattr(rows, "bench_shapes", fake)
    monkeypatch.setattr(results, "rows_table", lambda _: "the table")
    monkeypatch.setattr(results, "rows_document", lambda _: {"rows": []})
    monkeypatch.setattr(results, "save_results", lambda path, _: saved.append(path))
    monkeypatch.chdir(tmp_path)
    words = "bench --shapes wide8k --head-dim 64,128 --dtype fp32 --vs fla --level fast --stages"
    words += " --save --json"
    gate = ["--gate", "sigmoid", "--lower-bound", "-1.5", "--decay", "strong", "--turn", "there"]
    assert program.main([*words.split(), str(tmp_path / "rows.json"), *gate]) == 0
    assert "the table" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.json").read_text()) == {"rows": []}
    assert saved == [Path("docs/results/nvidia-h200.json")]
    assert environment.unverified() is None  # only while it measures
    del asked["on_row"]
    assert asked == {
        "op": "gdn2",
        "shapes": [SHAPES["wide8k"]],
        "K": 64,
        "V": 128,
        "dtype": "fp32",
        "vs": "fla",
        "gate": "sigmoid",
        "bound": 2,
        "l2norm": None,  # where kernels can
        "stages": True,
        "level": "fast",
        "decay": "strong",
        "turn": Path("there"),
    }
