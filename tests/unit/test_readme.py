"""The README, docs/serving.md and limits.md: commands, what CI runs, examples, tables."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from script_module import load_script
from source_tree import ROOT

from gdn2gen.cli import program
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import OPS, recurrence_named
from gdn2gen.family.shapes import NAMED_SHAPES, SHAPES
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.plans import PLANS
from gdn2gen.kernels.stages import STAGES
from gdn2gen.store.tuned_files import is_stale, load_tuned, write_tuned

SCRIPT = load_script("update_readme")
README = (ROOT / "README.md").read_text()
SERVING = (ROOT / "docs/serving.md").read_text()
LIMITS = (ROOT / "docs/limits.md").read_text()
RESULTS = (ROOT / "docs/results.md").read_text()
TEST_COMMAND = "pip install -e '.[test]' && pytest -q -n 2 -m 'not slow'"


def _blocks(language: str) -> list[str]:
    """Of the README, and then of what is said of serving."""
    return re.findall(rf"^```{language}\n(.*?)^```", README + SERVING, flags=re.M | re.S)


def _python(word: str) -> str:
    """The block of Python that says this."""
    (block,) = (block for block in _blocks("python") if word in block)
    return block


def _on_the_cpu(block: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is known after it ran, as it stands there."""
    import torch

    torch.manual_seed(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    known: dict[str, Any] = {}
    exec(block, known)
    return known


@pytest.mark.parametrize("gpu", ["nvidia-h100-80gb-hbm3", "nvidia-h200"])
def test_what_is_said_of_the_packaged_entries(gpu: str) -> None:
    file = load_tuned(ROOT / "tuned/gdn2" / f"{gpu}.json")
    assert file is not None
    stale = any(map(is_stale, file.entries))
    short = gpu.split("-")[1].upper()
    assert (f"The {short}'s entries are of earlier templates" in RESULTS) == stale
    weak = [entry for entry in file.entries if entry.decay == "weak"]
    alone = [entry for entry in weak if entry.needs_triton_alone]
    words = " ".join(LIMITS.split())
    dims = {id(entry): (entry.problem_key["K"], entry.problem_key["V"]) for entry in alone}
    usual = [entry for entry in alone if dims[id(entry)] == (128, 128)]
    found = re.search(
        rf"at 128 the {short}'s for ([^()]*), where forward and backward take ([0-9.]+) to "
        r"([0-9.]+) times as long",
        words,
    )
    assert bool(usual) == bool(found)
    assert {entry.level for entry in usual} in (set(), {"lean", "fast"})
    if found is not None:
        shapes = {x.name for x in SHAPES.values() if any(x.regime == y.regime for y in usual)}
        assert set(re.split(", | and ", found[1])) == shapes
        slower = [
            entry.measured["forward_backward_ms"] / min(
                x.measured["forward_backward_ms"] for x in weak
                if (x.problem_key, x.regime, x.level)
                == (entry.problem_key, entry.regime, entry.level)
            )
            for entry in usual
        ]  # fmt: skip
        assert found.groups()[1:] == (f"{min(slower):.1f}", f"{max(slower):.1f}")
    others = sorted({*dims.values()} - {(128, 128)})
    if others:
        *first, last = [str(K) for K, V in others if K == V]
        pairs = " and ".join(str(x) for x in others if x[0] != x[1])
        assert f"hold such for K = V of {', '.join(first)} and {last}, for {pairs}," in words


def test_every_variable_that_is_read_is_in_the_table() -> None:
    """By its whole name in the package's code; what a test or a script has of its own is not."""
    sources = (ROOT / "gdn2gen").rglob("*.py")
    read = {x for path in sources for x in re.findall(r"GDN2GEN_[A-Z_]+\b", path.read_text())}
    assert {*re.findall(r"^\| `(GDN2GEN_[A-Z_]+)", README, flags=re.M)} == read
    assert {*re.findall(r"GDN2GEN_[A-Z_]+\b", README + SERVING + LIMITS)} == read


def test_how_much_faster_it_is_said_to_be_is_in_the_table() -> None:
    said = re.search(
        r"those two run forward and backward (\d+) to (\d+) times as fast", " ".join(README.split())
    )
    rows = [
        line for line in README.splitlines() if line.startswith(("| `chunk_gdn2`", "| `chunk_kda`"))
    ]
    ratios = [float(re.findall(r"([0-9.]+)x \|", row)[0]) for row in rows]
    assert said is not None and len(ratios) == 2
    assert said.groups() == (f"{min(ratios):.0f}", f"{max(ratios):.0f}")


def test_first_two_commands() -> None:
    first, second, *_ = (block.strip() for block in _blocks("bash"))
    assert first == "pip install -e . && gdn2gen quick"
    assert second == TEST_COMMAND


def test_ci_runs_the_command_of_the_readme() -> None:
    script = (ROOT / ".ci/run").read_text()
    (extraction,) = re.findall(r"^test_command=\$\((.*)\)$", script, flags=re.M)
    done = subprocess.run(
        ["bash", "-c", extraction], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == TEST_COMMAND
    install = 'pip "${install[@]}"'
    steps = ("source", f"{install} torch==2.13.0", f"{install} -e '.[test]'", "eval")
    places = [script.index(f"\n{step}") for step in steps]
    assert places == sorted(places)


def test_ci_also_runs_what_pip_resolves() -> None:
    """In an environment of its own, where nothing was chosen beforehand."""
    script = (ROOT / ".ci/run").read_text()
    assert '\npip=("$scratch/cpu/bin/pip" --python "$scratch/resolved/bin/python")\n' in script
    first, resolved = script.split('eval "$test_command"')
    start = 'resolve > "$scratch/quick" 2>&1 &\nbeside=$!\n'
    (job,) = re.findall(r"^resolve\(\) \{\n(.*?)^\}\n", first, flags=re.M | re.S)
    assert first.index(job) < first.index(start) < first.index("\npip ")
    install, quick = job.splitlines()
    assert install == """  "${pip[@]}" "${install[@]}" -e '.[test]'"""
    marked = "-m 'resolved and not slow'"
    ended = 'wait "$beside" || { cat "$scratch/quick" >&2; exit 1; }\n'
    places = [resolved.index(step) for step in (ended, "resolved/bin/activate", marked)]
    assert places == sorted(places)
    assert 'pip "' not in resolved and "|| true" not in script
    command = quick.removeprefix('  "$scratch/resolved/bin/gdn2gen" ')
    assert command.startswith("quick ")
    program.build_parser().parse_args(shlex.split(command))


def test_commands_of_the_readme_are_understood() -> None:
    lines = [line for block in _blocks("bash") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("gdn2gen ")]
    assert len(commands) >= 5
    for line in commands:
        program.build_parser().parse_args(shlex.split(line, comments=True)[1:])


def test_python_of_the_readme_is_the_public_api() -> None:
    import inspect

    from gdn2gen import chunk_gdn2

    block = _python("# was: from fla.ops.gdn2 import chunk_gdn2")
    (call,) = re.findall(r"chunk_gdn2\((q.*)\)", block)
    words = [word.split("=")[0].strip() for word in call.split(",")]
    assert set(words) <= set(inspect.signature(chunk_gdn2).parameters)


def test_a_model_of_the_readme_learns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentence, by heart."""
    known = _on_the_cpu(_python("LanguageModel(256"), monkeypatch)
    loss, sentence = capsys.readouterr().out.splitlines()
    assert float(loss.removeprefix("loss ")) < 0.2
    assert sentence == known["text"]


def test_decoding_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And does what its last comment says."""
    known = _on_the_cpu(_python("import fused_recurrent_kda"), monkeypatch)
    assert not known["o"][2].any() and known["o"][[0, 1, 3]].any()
    changed = known["states"].flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == [3, 17, 40]


def test_prefill_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And writes the slots that it names."""
    known = _on_the_cpu(_python("checkpoint_every_n_tokens"), monkeypatch)
    changed = known["states"].flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == [7, 8, 9, 21]


def test_layers_of_the_readme_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says of them it asserts itself."""
    block = _python("import Cache, GatedDeltaNet2")
    assert "\nassert torch.allclose" in block
    _on_the_cpu(block, monkeypatch)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        *(f"docs/{page}.md" for page in ("serving", "limits", "architecture", "mamba")),
    ],
)
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    assert links
    assert [link for link in links if not (folder / link).exists()] == []


def test_architecture_names_every_room_stage_and_plan() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    rooms = {path.stem for path in (ROOT / "gdn2gen").glob("[a-z]*.py")} | {"tuning"}
    for name in (*rooms, *STAGES, *PLANS):
        assert f"`{name}`" in text, name
    for plan in PLANS.values():
        chains = f"| `{plan.name}` | {', '.join(plan.forward)} | {', '.join(plan.backward)} |"
        assert chains in text


def _update(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The script, in this process: to begin one takes it 3 s, and its work 0.1."""
    given, said = ["update_readme.py", "--root", str(root), *options], io.StringIO()
    code: int | str | None
    with redirect_stdout(said), redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", given)
        try:
            code = SCRIPT.main()
        except SystemExit as ended:
            code = ended.code
        except Exception:
            traceback.print_exc()
            code = 1
    assert isinstance(code, int)
    return subprocess.CompletedProcess(given, code, said.getvalue(), said.getvalue())


def test_results_are_up_to_date() -> None:
    command = [sys.executable, "scripts/update_readme.py", "--root", str(ROOT), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ops_are_those_of_the_family(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("<!-- family:begin -->\nold\n<!-- family:end -->\nafter\n")
    assert _update(tmp_path).returncode == 0
    text = (tmp_path / "README.md").read_text()
    assert "old" not in text and text.endswith("\n<!-- family:end -->\nafter\n")
    rows = [row.split(" | ") for row in text.splitlines() if row.startswith("| `chunk_")]
    assert len(rows) == len(OPS)
    for op, row in zip(OPS, rows, strict=True):
        member = recurrence_named(op)
        assert member.public.chunk in row[0] and f"`{member.update}`" == row[1]
        assert row[3:] == ["-", "-", "-", "- |"]


def _side(milliseconds: float) -> dict[str, Any]:
    timing = {"p20": 0, "p80": 0, "n": 9}
    return {
        "forward": {"median": milliseconds, **timing},
        "forward_backward": {"median": 4 * milliseconds, **timing},
        "peak_mib": 1000 * milliseconds,
        "errors": {"o": {"error": 0.0034, "regime": "sparse"}},
    }


def _row(shape: str, fla: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "shape": asdict(SHAPES[shape]),
        "problem": asdict(Problem()),
        "level": "lean",
        "recipe": "lean (exact)",
        "ours": _side(0.5),
        "fla": None if fla is None else _side(fla),
        "ratio_to_fla": None if fla is None else [fla / 0.5, fla / 0.5],
        "floor_ms": [0.125, 0.25],
        "ratio_to_floor": [4.0, 8.0],
        "stages": [],
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "command": "gdn2gen bench --vs fla --save",
        **changes,
    }


def test_table_is_made_from_the_results(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("before\n<!-- results:begin -->\nold\n"
                                        "<!-- results:end -->\nafter\n")  # fmt: skip
    rows = [_row("wide8k", None, command="gdn2gen bench"), _row("varlen8k", 1.0)]
    rows.append(_row("train4k", 1.0))
    fast = _row("train4k", None, level="fast")
    fast["ours"]["errors"]["o"]["error"] = 0.0001
    rows.append(fast)
    rows[0]["ours"]["errors"]["o"] = {"error": 0.0051, "regime": "mixed"}
    path = tmp_path / "docs/results/nvidia-h200.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schema": 1, "gpu": "NVIDIA H200", "rows": rows}))
    assert _update(tmp_path, "--check").returncode == 1
    assert _update(tmp_path).returncode == 0
    assert _update(tmp_path, "--check").returncode == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n<!-- results:begin -->\n### NVIDIA H200\n")
    assert text.endswith("\n<!-- results:end -->\nafter\n")
    assert "old" not in text
    lean, fast = text.split("level fast**")
    run = "2026-01-02, `gdn2gen bench --vs fla --save`; torch 2.11.0, triton 3.6.0"
    assert f"- train4k, varlen8k: {run}" in lean and f"- train4k: {run}" in fast
    assert "- wide8k: 2026-01-02, `gdn2gen bench`; " in lean
    line = "| train4k (4x4096x16) | 0.500 | 1.000 | 2.00 | 4.00 | 2.000 | 4.000 | 2.00 | 8.00 |"
    assert f"{line} 500 | 1000 |" in text
    assert "| wide8k (1x8192x64) | 0.500 | - | - | 4.00 |" in text
    assert "| varlen8k (6 packed in 1x8192x64) |" in text
    assert "| o | 5.1e-03 | mixed | 3.4e-03 | sparse |" in lean, "the worst of all rows"
    assert "| o | 1.0e-04 | sparse | - | - |" in fast
    assert text.index("train4k") < text.index("varlen8k"), "in the order of SHAPES"


def test_mambas_stand_in_the_table_at_their_own_shape(tmp_path: Path) -> None:
    """Of Mamba-2 without the output's gate; Mamba-3, which no recurrence declares, below all."""
    (tmp_path / "README.md").write_text("<!-- family:begin -->\n<!-- family:end -->\n")
    given = {"gate": "softplus", "has_dt_bias": True, "has_rate": True, "has_D": True}
    plain = Problem("mamba2", K=128, V=64, **given)
    found = ((4.0, plain), (7.0, replace(plain, has_z=True)), (2.0, Mamba3Problem(gate=True)))
    rows = [_row("train2k", ms, problem=x.document, peer="mamba_ssm") for ms, x in found]
    for row in rows:
        row["shape"] = asdict(NAMED_SHAPES["mamba4k"])
    rows.append(_row("train2k", 9.0, problem=plain.document))
    rows.insert(0, {**rows[2], "level": "fast", "fla": _side(1.75)})
    packed = replace(found[2][1], packed=True)
    rows.append(_row("varlen8k", 3.0, problem=packed.document, peer="mamba_ssm"))
    results = tmp_path / "docs/results/nvidia-h200.json"
    results.parent.mkdir(parents=True)
    results.write_text(json.dumps({"schema": 1, "gpu": "NVIDIA H200", "rows": rows}))
    (tmp_path / "docs/results.md").write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    filed = tmp_path / "tuned/kda/nvidia-h200.json"
    filed.parent.mkdir(parents=True)
    shutil.copy(ROOT / "tuned/kda" / filed.name, filed)
    assert _update(tmp_path).returncode == 0
    text = (tmp_path / "README.md").read_text()
    _, kda, *_, mamba2, mamba3 = [row for row in text.splitlines() if row.startswith("| `")]
    entries = json.loads(filed.read_text())["entries"]
    best = min(
        (x["measured"]["forward_backward_ms"], x["measured"]["forward_ms"])
        for x in entries
        if x["problem"]["K"] == 128 and x["level"] == "lean" and "decay" not in x
        and x["regime"] == {"tokens": 16384, "sequences": 4, "heads": 16}
    )  # fmt: skip
    assert kda.endswith(f"| - | {best[1]:.3f} / {best[0]:.3f} |"), "what is on file"
    assert mamba2.endswith("| 0.500, mamba_ssm 4.000 | 2.000, mamba_ssm 16.000 | 8.0x / 8.0x | - |")
    assert mamba3.startswith("| `mamba3_siso_combined`") and "mamba_ssm 2.000" in mamba3
    shown = (tmp_path / "docs/family.svg").read_text()
    assert "Mamba-2, mamba4k" in shown and "Mamba-3, mamba4k" in shown
    page = (tmp_path / "docs/results.md").read_text()
    assert page.index("**mamba2, K=128, V=64") < page.index("**mamba3, K=128, V=64")
    assert ", with z, softplus gate" in page and ", D and Z" in page
    # packed or not, a block for each level
    blocks = [x for x in page.split("\n**") if x.startswith("mamba3")]
    levels = [x.partition("**")[0].rpartition(", ")[2] for x in blocks]
    assert levels == ["level lean", "level fast"]
    assert "varlen8k" in blocks[0] and "| 2.000 |" in blocks[0] and "| 1.750 |" in blocks[1]


def test_times_on_file_stand_below_the_results(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    rows = [_row("train4k", 1.0), _row("train4k", 1.0, level="fast")]
    path = tmp_path / "docs/results/nvidia-h200.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schema": 1, "gpu": "NVIDIA H200", "rows": rows}))
    tuned = load_tuned(ROOT / "tuned/gdn2/nvidia-h200.json")
    assert tuned is not None
    wanted, regime = {"K": 128, "V": 128}, SHAPES["wide8k"].regime.key
    entry = next(
        x for x in tuned.entries
        if wanted.items() <= x.problem_key.items() and x.regime_key == regime and x.level == "lean"
        and x.serves_every_option and "scan" in x.configs
    )  # fmt: skip
    # beside a faster one, what serves calls that the faster one refuses is in no table
    slower = {x: y * 1.5 if x.endswith("_ms") else y for x, y in entry.measured.items()}
    parallel = default_config("scan", Problem()).replace(segments="parallel")
    configs = {**entry.configs, "scan": parallel}
    both_entries = (replace(entry, measured=slower), replace(entry, configs=configs))
    assert both_entries[0].key != both_entries[1].key
    strong = replace(entry, measured=slower, decay="strong")
    write_tuned(
        tmp_path / "tuned/gdn2/nvidia-h200.json", replace(tuned, entries=(*both_entries, strong))
    )
    assert _update(tmp_path).returncode == 0
    text = (tmp_path / "README.md").read_text()
    titles = ("as CUDA graphs, ms**", "as CUDA graphs, under strong decay, ms**")
    assert [text.count(x) for x in titles] == [1, 1]
    assert text.count("| o |") == 1 and text.count("Errors as in the table above.") == 1
    both = entry.measured["forward_backward_ms"]
    graphs = f"|  | wide8k |\n|---|---:|\n| forward | {entry.measured['forward_ms']:.3f} |\n"
    assert f"{graphs}| forward+backward, lean | {both:.3f} |\n\n" in text
    command, date = (tuned.metadata[x] for x in ("command", "date"))
    assert f"- tuned/gdn2/nvidia-h200.json, last changed {date[:10]}: `{command}`; driver" in text


def test_a_foreign_file_of_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(README)
    path = tmp_path / "docs/results/gpu.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    done = _update(tmp_path)
    assert done.returncode != 0
    assert str(path) in done.stderr
    assert (tmp_path / "README.md").read_text() == README
