"""What an installed gdn2gen contains, what importing it costs, and which way its imports run."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "gdn2gen"

# From the ground up: a room imports only from rooms above its own line. A room is a module with
# its private neighbours, or a folder.
ROOMS = (
    ("errors",),
    ("knobs",),
    ("folders",),
    ("nvrtc",),
    ("paths",),
    ("files",),
    ("terminal",),
    ("problem",),
    ("shapes",),
    ("device",),
    ("inputs",),
    ("reference", "_reference_chunk"),
    ("tolerances",),
    ("stages",),
    ("floor",),
    ("plans",),
    ("anchors",),
    ("config",),
    ("validity",),
    ("render",),
    ("build", "_interpreter"),
    ("direct", "programs"),
    ("ahead",),
    ("store", "_store_claims", "_store_format", "_store_lookup"),
    ("dispatch", "_dispatch_words"),
    ("sharing",),
    ("sequences",),
    ("arguments",),
    ("call",),
    ("passes",),
    ("layout",),
    ("launch",),
    ("ops", "_autograd", "_kernels", "_lookup", "_operands", "_torch_ops"),
    ("generate", "_generate_files"),
    ("bench", "_bench_accuracy", "_bench_results", "_bench_rows", "_bench_sides", "_bench_time"),
    ("_verify_cases", "_verify_checks"),
    ("tune",),
    ("verify",),
    (
        "cli",
        "_cli_inspect",
        "_cli_ledger",
        "_cli_measure",
        "_cli_options",
        "_cli_report",
        "_cli_tune",
        "_cli_tuned",
    ),
    ("__main__",),
)
ORDER = {name: line for line, room in enumerate(ROOMS) for name in room}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def _imports(node: ast.AST) -> Iterator[str]:
    """Names of gdn2gen's modules that the code imports when it runs, in functions too."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports here are absolute"
        if node.module == "gdn2gen":
            yield from (alias.name for alias in node.names)
        elif node.module and node.module.startswith("gdn2gen."):
            yield node.module.split(".")[1]
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("gdn2gen."))
    for child in ast.iter_child_nodes(node):
        yield from _imports(child)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_upwards_only(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in ORDER, f"give {room} its place in ROOMS"
    for name in _imports(ast.parse(path.read_text())):
        if name == "__version__":
            continue
        assert name in ORDER, f"{path.name} imports {name}, which has no place in ROOMS"
        assert ORDER[name] <= ORDER[room], f"{path.name} imports {name}, which lies below it"


def test_architecture_names_the_rooms_in_their_order() -> None:
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES} == {*ORDER}
    text = (ROOT / "docs/architecture.md").read_text()
    table = text.partition("| room |")[2].partition("\n\n")[0]
    named = [name for row in table.splitlines()[2:] for name in row.split("|")[1].split("`")[1::2]]
    assert named == [name for room in ROOMS for name in room if not name.startswith("_")]


def test_ops_never_reach_the_tuner() -> None:
    assert ORDER["ops"] < ORDER["tune"]
    assert ORDER["dispatch"] < ORDER["tune"]


def _python(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.resolved
def test_import_is_quick_and_touches_no_gpu() -> None:
    program = """
import sys, time, torch
started = time.process_time()
import gdn2gen
gdn2gen.chunk_gdn2
seconds = time.process_time() - started
assert not torch.cuda.is_initialized()
assert not {"optuna", "tilelang", "jinja2.sandbox", "rich"} & {*sys.modules}, sys.modules.keys()
print(seconds)
"""
    # Processor time; a second try, since the first may have had to write bytecode.
    assert any(float(_python(program)) < 1.0 for _ in range(2))


def test_tests_see_nothing_of_the_users(tmp_path: Path) -> None:
    """Neither settings, nor what was tuned; and they leave nothing in the user's cache."""
    probe = tmp_path / "test_probe.py"
    probe.write_text("from gdn2gen import paths\ndef test_it(): print(paths.user_tuned_dir())\n")
    mine = tmp_path / "mine"
    environment = os.environ | {"GDN2GEN_TUNED_DIR": str(mine), "GDN2GEN_CACHE_DIR": str(mine)}
    command = [sys.executable, "-m", "pytest", "-qs", "-p", "no:cacheprovider", str(probe)]
    options = [f"--confcutdir={ROOT / 'tests'}", "-p", "tests.conftest", f"--rootdir={tmp_path}"]
    done = subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gdn2gen-tests-" in done.stdout and str(mine) not in done.stdout


def test_the_package_itself_is_free() -> None:
    program = "import sys, gdn2gen; print('torch' in sys.modules, 'triton' in sys.modules)"
    assert _python(program) == "False False"


@pytest.mark.slow
def test_wheel_holds_templates_and_tuned_files(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for folder in ("templates", "tuned"):
        found = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        source = {path.relative_to(ROOT) for path in found if path.suffix != ".lock"}
        inside = site / "gdn2gen/_data"
        assert {path.relative_to(inside) for path in (inside / folder).rglob("*.*")} == source
    assert (site / "gdn2gen/py.typed").is_file()
    assert not (site / "tests").exists()
    program = f"""
import sys
sys.path.insert(0, {str(site)!r})
from gdn2gen import __version__, paths
from gdn2gen.render import stage_digest
assert str(paths.templates_dir()).startswith({str(site)!r}), paths.templates_dir()
assert str(paths.packaged_tuned_dir()).startswith({str(site)!r}), paths.packaged_tuned_dir()
print(__version__, stage_digest("scan"))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    from gdn2gen import __version__
    from gdn2gen.render import stage_digest

    assert done.stdout.split() == [__version__, stage_digest("scan")]
    assert wheel.name.startswith(f"gdn2gen-{__version__}-")


def test_project_says_what_it_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = " ".join(project["dependencies"])
    languages = ("torch>=2.11", "triton>=3.6", "tilelang>=", "nvidia-cuda-cccl")
    for package in (*languages, "optuna", "jinja2", "rich"):
        assert package in needed
    assert project["scripts"] == {"gdn2gen": "gdn2gen.cli:main"}
    assert project["requires-python"] == ">=3.11"
    assert {"pytest>=8.0", "pytest-xdist>=3.6"} <= {*project["optional-dependencies"]["test"]}
