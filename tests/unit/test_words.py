"""What the commands say: odd data, narrow terminals, closed streams, options refused by name."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from odd_files import H200, document, entry, put
from rich.text import Text
from source_tree import ROOT

from gdn2gen import tuning
from gdn2gen.base import device, terminal
from gdn2gen.base.device import named_device
from gdn2gen.cli import program
from gdn2gen.cli import tune as cli_tune
from gdn2gen.codegen.render import template_digest
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.family.shapes import SHAPES, parse_shapes
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.store import tuned_files
from gdn2gen.store.dispatch import Found, find_recipe, tune_command
from gdn2gen.tuning.records.places import open_ledger
from gdn2gen.tuning.views.progress import LiveProgress
from gdn2gen.tuning.views.report import ShapeResult, TuneReport
from gdn2gen.workflows import tune as workflow

MARKUP = "no [/usr/lib/x.so], no [/x], no [red]one[/red] :smile:"


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    monkeypatch.setenv("GDN2GEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("gdn2gen.store.sharing.packaged_tuned_dir", lambda: tmp_path / "none")
    return tmp_path


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gdn2gen", *words]
    return subprocess.run(command, text=True, cwd=ROOT, check=False, **options)


# Data is data


def test_markup_in_a_refusal_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    book = open_ledger("gdn2", H200)
    config = default_config("scan", Problem())
    book.add(MARKUP, Problem(), config, template_digest(config))
    assert program.main(["ledger", "--device", "H200"]) == 0
    said = capsys.readouterr().out
    for word in ("[/usr/lib/x.so]", "[/x]", "[red]one[/red]", ":smile:"):
        assert word in said, word


def test_markup_in_a_path_or_a_name_is_shown_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "[" / "x]"
    folder.mkdir(parents=True)
    for name, ms in (("a", 1.0), ("b", 2.0)):
        text = document(entry(measured={"forward_backward_ms": ms}), gpu="NVIDIA [/H200] \ud800")
        (folder / name).write_text(text)
    assert program.main(["tuned", "diff", str(folder / "a"), str(folder / "b")]) == 1
    assert "[/x]" in capsys.readouterr().out.replace("\n", "")


def test_only_the_terminal_makes_consoles() -> None:
    """A second one would take data for markup."""
    for path in (ROOT / "gdn2gen").rglob("*.py"):
        if path.name != "terminal.py":
            made = re.findall(r"rich\.table import|Console\(|from_markup", path.read_text())
            allowed = ["rich.table import"] if path.name == "progress.py" else []
            assert made == allowed, path


def test_control_codes_and_half_pairs_are_spelled_out() -> None:
    assert terminal.plain("a\x1b[2Jb\ud800\tc\nd é") == "a\\x1b[2Jb\\ud800\\tc\nd é"


# Narrow terminals


def shown(what: Any, width: int) -> str:
    out = io.StringIO()
    console = terminal.console()
    console.file, console.width = out, width
    console.print(what)
    return out.getvalue()


def report_of(shape: str = "train4k") -> TuneReport:
    recipe = Recipe.default(Problem(), "lean")
    result = ShapeResult(
        shape=SHAPES[shape],
        level="lean",
        recipe=recipe,
        forward_ms=0.30712,
        forward_backward_ms=1.44123,
        default_forward_backward_ms=12345.67891,
        spread=0.01,
        peak_mib=1809.0,
        errors={"final_state": 4.6e-3},
    )
    return TuneReport(Problem(), H200, Path("/x"), [result])


@pytest.mark.parametrize("width", [20, 40, 60, 100])
def test_no_number_is_cut(width: int) -> None:
    said = shown(report_of().table(), width)
    assert "…" not in said
    for number in ("12345.679", "1.441", "8566.07x", "final_state 4.6e-03", "32"):
        assert number in said or width == 20, (number, said)
    assert max(map(len, said.splitlines())) <= width


def test_every_row_is_a_paragraph_where_a_table_does_not_fit() -> None:
    sheet = terminal.Sheet("Title", ("name", "ms"), words=("name",))
    sheet.add("a" * 60, "1.234567")
    sheet.add(Text("b", style="red"), "-")
    wide, narrow = shown(sheet, 100), shown(sheet, 30)
    assert "│" in wide or "┃" in wide
    assert narrow.splitlines()[:2] == ["Title", "name  " + "a" * 24]
    assert "ms    1.234567" in narrow
    with pytest.raises(ValueError, match="1 cells"):
        sheet.add("alone")


@pytest.mark.parametrize("command", ["explain --device RTX4090", "ledger --device H200"])
def test_commands_at_40_columns(command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    config = default_config("prepare", Problem())
    reason = "resources: spills 123456 bytes a thread"
    open_ledger("gdn2", H200).add(reason, Problem(), config, template_digest(config))
    assert program.main(command.split()) == 0
    said = capsys.readouterr().out
    assert "…" not in said
    words = ["123456"] if "ledger" in command else ["BT=32", "num_stages=1", "maxnreg=0"]
    assert all(word in said for word in words)
    if "explain" in command:
        configs = [x for x in said.splitlines() if x.startswith(" ")]
        assert max(map(len, configs)) <= 40


def test_the_live_display_cuts_no_number() -> None:
    progress = LiveProgress(terminal.console())
    progress.best_so_far("reverse_scan BT=64 of a long name", 1.234567, 12345.6)
    progress.trial(default_config("prepare", Problem()), "resources", MARKUP)
    said = shown(progress._render(), 40)
    assert "…" not in said and "1.235" in said and "12345.600" in said and "[/x]" in said


# What is not used is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["explain", "--shape", ""], "no shape is named in ''"),
        (["explain", "--shape", "9" * 5000 + "x1x1"], "unknown shape"),
        (["generate", "--out", "x", "--shape", " , "], "no shape is named in ' , '"),
        (["generate", "--stage", "scan", "--out", "x"], "takes no --out"),
        (["generate", "--stage", "scan", "--shape", "train4k"], "takes no --shape"),
        (["generate", "--stage", "scan", "--level", "lean"], "takes no --level"),
        (["generate", "--stage", "scan", "--config", "BT=--64"], "'--64'"),
        (["generate", "--stage", "scan", "--config", "BT=\u00b2"], "'\u00b2'"),
        (["generate", "--stage", "scan", "--config", "BT=" + "9" * 5000], "scan.BT"),
        (["generate", "--stage", "scan", "--config", "BT=64 BT=32"], "BT is given twice"),
        (["generate", "--out", "x", "--language", "tilelang"], "--language tilelang"),
        (["verify", "--list", "--json", "x"], "takes no --json"),
        (["verify", "--renew"], "looks at no entries (--tuned does), and takes no --renew"),
        (["verify", "--tuned", "--interpreter"], "takes no --interpreter"),
        (["verify", "--tuned", "--list"], "takes no --list"),
        (["verify", "--tuned", "bf16-*"], "'bf16-*'"),
        (["ledger", "--retest", "--json"], "takes no --json"),
        (["ledger", "--retest", "--device", "H200"], "takes no --device"),
        (["tune", "--only-failing", "--target", "H200"], "takes no --target"),
        (["report", "--storage", "/no/such/file"], "not changed. Give a journal that"),
        (["report", "--results", "/no/such/file"], "/no/such/file"),
        (["bench", "--shapes", ""], "no shape is named in ''"),
        (["tune", "--shapes", ""], "no shape is named in ''"),
    ],
    ids=lambda x: " ".join(x)[:50] if isinstance(x, list) else "",
)
def test_options_that_do_nothing_are_refused(words: list[str], said: str, capsys: Any) -> None:
    assert program.main(words) == program.EXIT_USAGE
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    "words",
    [
        *("tune --storage", "tune --out", "quick --budget", "report --storage", "report --out"),
        *("generate --out", "bench --json", "tuned export --to", "tuned import"),
    ],
)
def test_an_empty_value_is_refused(words: str, capsys: Any) -> None:
    """As of a shell's variable that is not set; it would be the present folder, or the default."""
    with pytest.raises(SystemExit) as ended:
        program.main([*words.split(), ""])
    assert ended.value.code == program.EXIT_USAGE
    assert "but got ''" in capsys.readouterr().err


def test_ledger_knows_the_stages(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        program.main(["ledger", "--stage", "nope"])
    assert "reverse_scan" in capsys.readouterr().err
    assert program.main(["ledger", "--device", "H200", "--stage", "pipeline"]) == 0


# Streams


@pytest.mark.parametrize("command", ["explain --device H200", "generate --stage scan"])
@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "> /dev/full"])
def test_closed_and_full_streams(command: str, redirection: str) -> None:
    line = f"{sys.executable} -m gdn2gen {command} {redirection}"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, check=False
    )
    full = "full" in redirection
    assert done.returncode == (program.EXIT_USAGE if full else 0), done.stderr
    assert ("No space left" in done.stderr) == full and "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("command", "unbuffered"),
    [
        ("explain --device H200", ""),
        ("explain --device H200", "1"),
        ("report --device H200 --out PAGE", ""),
        pytest.param("report --device H200 --out PAGE", "1", marks=pytest.mark.slow),
    ],
)
def test_a_reader_that_goes_is_no_error(command: str, unbuffered: str, tmp_path: Path) -> None:
    put(tmp_path / "cache/tuned", document(*(entry(1000 * n) for n in range(1, 40))))
    page = tmp_path / "page.html"
    line = f"{sys.executable} -m gdn2gen {command}".replace("PAGE", str(page))
    once, both = f"{line} | true; echo $?", f"{line} 2>&1 | true; echo $?"
    # a page takes 6 s of a core
    script = f"set -o pipefail; {once if 'report' in command else f'{once}; {both}'}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, check=False,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered, "COLUMNS": "40"},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0\n" * script.count("echo"), "")


def test_a_broken_pipe_inside_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Only the reader of stdout may go without a word."""

    def broken(*_: Any, **__: Any) -> None:
        raise BrokenPipeError("a worker has gone")

    monkeypatch.setattr("gdn2gen.workflows.explain.find_call", broken)
    assert program.main(["explain", "--device", "H200"]) == program.EXIT_USAGE
    assert "a worker has gone" in capsys.readouterr().err


def test_bytes_that_are_no_text_are_spelled_out() -> None:
    done = run("explain", "--device", os.fsdecode(b"X\xff9"), capture_output=True)
    assert done.returncode == program.EXIT_USAGE and "Traceback" not in done.stderr
    assert "udcff" in done.stderr


# For programs


def test_explain_as_json(capsys: Any) -> None:
    words = ["explain", "--device", "H200", "--shape", "train4k,2x77x5", "--json"]
    assert program.main(words) == 0
    exact, near = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (exact["shape"], exact["source"], exact["tune"]) == ("train4k", "exact", None)
    assert exact["device"]["name"] == "NVIDIA H200"
    assert len({x["BT"] for x in exact["configs"].values()}) == 1
    assert exact["configs"].keys() >= {"grad_key"} or exact["configs"].keys() >= {"grad_blocks2"}
    assert near["source"] == "nearest"
    assert near["tune"] == "gdn2gen tune --head-dim 128 --shapes 2x77x5 --level lean"


def test_diff_and_report_as_json(tmp_path: Path, capsys: Any) -> None:
    old = put(tmp_path / "cache/tuned", document(entry(), entry(1000)))
    new = tmp_path / "new.json"
    faster = entry(measured={"forward_backward_ms": 0.7205})
    new.write_text(document(faster, entry(1000)))
    assert program.main(["tuned", "diff", str(old), str(new), "--json"]) == 1
    (found,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert found["ratio"] == pytest.approx(0.5) and found["new"]["level"] == "lean"
    assert program.main(["tuned", "diff", str(old), str(old), "--json"]) == 0
    assert capsys.readouterr().out == ""
    assert program.main(["report", "--device", "H200", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [x["tuned_ms"] for x in rows] == [1.441, 1.441]
    assert rows[0]["shape"] == "train4k" and rows[0]["device"] == "NVIDIA H200"
    assert not Path("gdn2gen-report.html").exists()


# What to do next


def test_the_command_on_file_is_as_a_shell_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "tune", "--target", "RTX 4090"])
    assert terminal.command_line() == "gdn2gen tune --target 'RTX 4090'"
    for words in (["--into", "a b", "lean"], ["--into=a b", "lean"], ["lean", "--into", "x"]):
        monkeypatch.setattr(sys, "argv", ["x.py", *words])
        assert terminal.command_line("python x.py", less=("--into",)) == "python x.py lean"


def test_explain_says_where_a_call_is_refused(capsys: Any) -> None:
    assert program.main(["explain", "--device", "RTX 4090", "--head-dim", "64,128"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("verified ")]
    assert line.startswith("verified  not on sm_89: a call is refused without")
    assert "gdn2gen verify --op gdn2 --head-dim 64,128" in line
    assert program.main(["explain", "--device", "H200", "--head-dim", "64,128"]) == 0
    assert "verified " not in capsys.readouterr().out


def test_explain_at_a_default_says_which_command_tunes(capsys: Any) -> None:
    gate = ["--gate", "sigmoid", "--lower-bound", "-2", "--no-l2norm", "--dtype", "fp16"]
    words = ["explain", "--device", "RTX 4090", "--head-dim", "64,128", "--level", "fast", *gate]
    assert program.main(words) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("tune ")]
    where, _, command = line.partition(": ")
    assert where == "tune      on NVIDIA GeForce RTX 4090"
    assert command.startswith("gdn2gen tune --head-dim 64,128 --shapes train4k ")
    args = program.build_parser().parse_args(command.split()[1:])
    assert args.level == "fast"
    args.head_dim = args.head_dim[0]
    from gdn2gen.cli.options import problem_of

    given = program.build_parser().parse_args(words)
    assert problem_of(args).key == problem_of(given).key


def test_what_is_exact_or_forced_needs_no_command() -> None:
    assert tune_command(Found(Recipe.default(Problem()), "default", "")) is None
    found = find_recipe(Problem(), SHAPES["train4k"].regime, H200)
    assert (found.source, tune_command(found)) == ("exact", None)
    packed = replace(found, source="default", regime=Regime(61, 3, 2))
    assert parse_shapes((tune_command(packed) or "").split()[5]) == [SHAPES["varlen8k"]]


def test_what_tune_files_calls_find(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """Without an export, of any variable."""
    gpu = replace(H200, name="NVIDIA H999", slug="nvidia-h999")

    def search(*, problem: Any, shapes: Any, device: Any, out_dir: Path, **_: Any) -> Any:
        metadata = tuned_files.metadata_for(device, {}, "gdn2gen tune")
        tuned_files.merge_entries(
            tuned_files.tuned_path(out_dir, "gdn2", device), metadata, [entry()]
        )
        return SimpleNamespace(problem=problem, device=device, results=[], table=lambda: "")

    monkeypatch.setattr(tuning, "tune", search, raising=False)
    monkeypatch.setattr(cli_tune, "present_or_target", lambda _: (gpu, True))
    monkeypatch.setattr(workflow, "present_or", lambda _: (gpu, True))
    monkeypatch.setattr(workflow, "in_source_tree", lambda: False)
    regime = SHAPES["train4k"].regime
    assert find_recipe(Problem(), regime, gpu).source != "exact"
    assert program.main(["tune", "--head-dim", "128", "--shapes", "train4k"]) == 0
    assert "export" not in capsys.readouterr().out
    found = find_recipe(Problem(), regime, gpu)
    assert found.source == "exact" and found.file is not None
    assert Path(found.file).is_relative_to(tmp_path / "cache" / "tuned")


def test_a_package_in_triton_alone(tmp_path: Path, capsys: Any) -> None:
    words = ["generate", "--target", "H200", "--out"]
    assert program.main([*words, str(tmp_path / "tuned")]) == 0
    assert "need torch, triton and tilelang" in capsys.readouterr().out
    assert program.main([*words, str(tmp_path / "triton"), "--language", "triton"]) == 0
    said = capsys.readouterr().out
    assert "which need torch and triton but not gdn2gen:" in said
    assert "Triton was asked for, so defaults stand in for" in said
    texts = {path.name: path.read_text() for path in (tmp_path / "triton").glob("*.py")}
    assert not any("tilelang" in text for text in texts.values())
    pattern = r"gdn2gen (generate --out (?:[^\\\n]*\\\n)*[^\n]*)"
    (command,) = re.findall(pattern, texts["__init__.py"])
    again = command.replace("\\\n", " ").replace("DIR", str(tmp_path / "again")).split()
    assert program.main(again) == 0
    assert {x.name: x.read_text() for x in (tmp_path / "again").glob("*.py")} == texts


def test_a_stage_in_a_language(capsys: Any) -> None:
    words = ["generate", "--stage", "scan", "--config", "BT=64"]
    assert program.main([*words, "--language", "tilelang"]) == 0
    assert "import tilelang" in capsys.readouterr().out
    assert program.main([*words, "--language", "triton"]) == 0
    assert "import tilelang" not in capsys.readouterr().out


def test_dir_shows_what_there_is() -> None:
    import gdn2gen

    assert {"chunk_gdn2", "chunk_kda", "__version__"} <= {*dir(gdn2gen)}
    for name in dir(gdn2gen):
        getattr(gdn2gen, name)


def test_advice_without_a_gpu_exists(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert program.main(["bench"]) == program.EXIT_USAGE
    error = capsys.readouterr().err
    assert "named_device" not in error
    for command in ("explain", "generate", "report"):
        assert command in error
    with pytest.raises(Exception, match="NVIDIA's") as raised:
        named_device("MI300X")
    assert "did you mean" not in str(raised.value)


# Other libraries' words


def test_libraries_are_silent_unless_asked() -> None:
    """Asked in one fork of a process that has imported TileLang, 5 s of a core, and not in one."""
    program = """
import logging, os, sys, warnings, tilelang
asked = os.fork() == 0
if not asked:
    assert os.wait()[1] == 0
    print("not asked", file=sys.stderr, flush=True)
os.environ["GDN2GEN_VERBOSE"] = str(int(asked))
from gdn2gen.base.environment import hush, hush_tilelang
hush()
warnings.warn("Attempting to run cuBLAS, but there was no current CUDA context!")
hush_tilelang()
logging.getLogger("tilelang.jit.kernel").info("TileLang begins to compile kernel")
logging.getLogger("tilelang.jit.kernel").warning("of no use")
import tilelang.cache.kernel_cache
cache = logging.getLogger("tilelang.cache.kernel_cache")
cache.setLevel(logging.DEBUG)  # as it does when it is first used
cache.warning("consider using @tilelang.jit")
logging.getLogger("tilelang.jit.kernel").error("a true error")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], text=True, cwd=ROOT, check=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    asked, silent = done.stdout.split("not asked\n")
    assert "a true error" in asked and "a true error" in silent
    for words in ("cuBLAS", "begins to compile", "of no use", "consider using"):
        assert words in asked and words not in silent, words
