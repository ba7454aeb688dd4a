"""Whether templates still make the kernels that they made at a git revision; digests renewed if so.

    python scripts/same_text.py           # against HEAD
    python scripts/same_text.py main      # against another revision
    python scripts/same_text.py --renew   # and file the new digests where the old ones are filed
    python scripts/same_text.py --less compiled,LOADS   # whatever these names stand for in a module

For whoever moves or mends templates. Every form of every stage, and every config on file, is
rendered for many problems from both trees. Texts may differ in docstrings and comments, and name
another digest; where anything else differs, the script says so, renews nothing of it and exits 1. A
template that changed the kernels of one op, or of one gate, is renewed for the others.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, os.environ.get("SAME_TEXT_TREE", str(ROOT)))

from gdn2gen.base.errors import Gdn2genError  # noqa: E402
from gdn2gen.base.files import replace_file  # noqa: E402
from gdn2gen.codegen.render import render, render_tables  # noqa: E402
from gdn2gen.family.problem import Problem  # noqa: E402
from gdn2gen.family.registry import OPS, recurrence_named  # noqa: E402
from gdn2gen.kernels.config import Config, default_config  # noqa: E402
from gdn2gen.kernels.extras import EXTRAS  # noqa: E402
from gdn2gen.kernels.stages import STAGES  # noqa: E402
from gdn2gen.kernels.validity import why_invalid  # noqa: E402

if TYPE_CHECKING:
    from gdn2gen.kernels.limits import Knob

TABLES: Final = "chunk_tables"
# Beside the plain problem: everything that templates ask about it.
FLAGS: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"varlen": True, "gate_dtype": "bf16"},
    {"initial_state": True, "final_state": True},
    {"final_state": True, "state_v_first": True, "varlen": True, "l2norm": False},
    {"gate": "softplus", "has_A_log": True, "has_dt_bias": True},
    {"gate": "softplus", "has_A_log": True, "varlen": True, "initial_state": True},
    {"gate": "sigmoid", "has_A_log": True, "bound": 2},
    {"gate": "sigmoid", "has_dt_bias": True, "varlen": True, "bound": 1},
)
# And what they ask about one whose erase and write factors are tied.
TIED_FLAGS: Final[tuple[dict[str, Any], ...]] = (
    {"beta_sigmoid": True, "varlen": True},
    {"beta_sigmoid": True, "neg_eigval": True},
)
# And of one whose beta may be wider than q, where that is.
WIDE_FLAGS: Final[tuple[dict[str, Any], ...]] = ({"beta_fp32": True, "varlen": True},)
# Knobs that choose between pieces of a template; the others are numbers in it.
_FORMS: Final = (
    *("language", "decay", "solve", "segments", "gating", "pairs"),
    *("BT", "chunks", "maxnreg"),
)
_TILES: Final[tuple[dict[str, Knob], ...]] = (
    {},
    {"num_warps": 1, "BK": 32, "BV": 32},
    {"num_warps": 4, "BK": 64, "BV": 64},
    {"num_warps": 4, "BK": 64, "BV": 128},
    {"num_warps": 4, "BK": 128, "BV": 128},
    {"num_warps": 4, "BK": 128, "maxnreg": 168},
)

Case = dict[str, Any]
Filed = tuple[str, str, str]


def cases() -> Iterator[Case]:
    """What is rendered: a stage, a problem, and knobs (or, of the tables, a chunk size)."""
    seen = set()
    for problem, stage, knobs in (*_filed(), *_formed()):
        if stage != TABLES:
            config = Config.of(stage, knobs)
            if why_invalid(config, problem) is not None:
                continue
        case = {"stage": stage, "problem": problem.document, "knobs": knobs}
        words = json.dumps(case, sort_keys=True)
        if words not in seen:
            seen.add(words)
            yield case


def _filed() -> Iterator[tuple[Problem, str, dict[str, Knob]]]:
    for path in sorted((ROOT / "tuned").glob("*/*.json")):
        for entry in json.loads(path.read_text())["entries"]:
            for stage, knobs in entry["configs"].items():
                if stage not in STAGES:
                    continue
                known = {**STAGES[stage].later, **knobs}
                if set(known) - set(EXTRAS) == set(STAGES[stage].domains):
                    for flags in _flags(entry["problem"]):
                        yield Problem(**{**entry["problem"], **flags}), stage, known


def _formed() -> Iterator[tuple[Problem, str, dict[str, Knob]]]:
    sizes: tuple[dict[str, Any], ...] = ({}, {"dtype": "fp16"}, {"dtype": "fp32", "K": 64, "V": 64})
    plain: list[dict[str, Any]] = [{"op": op, **size} for size, op in product(sizes, OPS)]
    plain.append({"op": "mamba2", "V": 64})  # a form of grad_group has no other
    for problem in (Problem(**{**x, **flags}) for x in plain for flags in _flags(x)):
        yield problem, TABLES, {"BT": 32}
        for stage in STAGES:
            domain = STAGES[stage].domains
            chosen = [x for x in _FORMS if x in domain]
            values = [domain[x][:2] if x == "maxnreg" else domain[x] for x in chosen]
            for form in product(*values, (1, 2)):
                config = _with_tiles(
                    problem, stage, dict(zip((*chosen, "num_stages"), form, strict=True))
                )
                if config is not None:
                    yield problem, stage, dict(config)


def _flags(problem: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    from gdn2gen.family.problem import untaken  # which an earlier tree may not have

    recurrence = recurrence_named(problem["op"])
    wide = recurrence.has_factor and problem.get("dtype") != "fp32"
    tied = TIED_FLAGS if recurrence.activates_beta else ()
    given = [x for x in FLAGS if x.get("gate", "none") in recurrence.activations]
    lacking = untaken(recurrence.name)
    known = [{name: y for name, y in x.items() if name not in lacking} for x in given]
    return (*known, *tied, *(WIDE_FLAGS if wide else ()))


def _with_tiles(problem: Problem, stage: str, form: dict[str, Knob]) -> Config | None:
    """A config of this form, if any is valid."""
    default = {**default_config(stage, problem), **form}
    if any(y not in STAGES[stage].domains.get(x, (y,)) for x, y in form.items()):
        return None
    for tiles in _TILES:
        known = default | {x: y for x, y in tiles.items() if y in STAGES[stage].domains.get(x, ())}
        config = Config.of(stage, known)
        if why_invalid(config, problem) is None:
            return config
    return None


def render_all(given: list[Case]) -> list[list[str]]:
    """Digest and source of each case; an error's words in their place."""
    found = []
    for case in given:
        knobs = case["knobs"]
        try:
            problem = Problem(**case["problem"])
            if case["stage"] == TABLES:
                made = render_tables(problem, knobs["BT"])
            else:
                made = render(problem, case["stage"], Config.of(case["stage"], knobs))
        except (Gdn2genError, TypeError) as error:  # a field that an earlier Problem has not
            found.append(["", str(error)])
        else:
            found.append([made.digest, made.source])
    return found


def rendered_at(revision: str, given: list[Case]) -> list[list[str]]:
    """The same by the code and the templates of a git revision."""
    files = subprocess.run(
        ["git", "archive", revision, "gdn2gen", "templates"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(files)) as archive:
            archive.extractall(folder, filter="data")
        made = subprocess.run(
            [sys.executable, __file__, "--list"],
            input=json.dumps(given),
            env={**os.environ, "SAME_TEXT_TREE": folder, "PYTHONPATH": folder},
            capture_output=True,
            text=True,
            check=False,
        )
    if made.returncode:
        raise SystemExit(f"the kernels of {revision} cannot be made:\n{made.stderr.strip()}")
    found: list[list[str]] = json.loads(made.stdout)
    return found


def code_of(source: str, less: Sequence[str] = ()) -> str:
    """A module without its docstrings and comments, and without what has one of these names."""
    tree = ast.parse(source)
    tree.body = [x for x in tree.body if _name(x) not in less]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _name(statement: ast.stmt) -> str:
    match statement:
        case ast.FunctionDef(name=name) | ast.Assign(targets=[ast.Name(id=name)]):
            return name
    return ""


def compared(old: list[str], new: list[str], less: Sequence[str] = ()) -> str:
    """`same`, `words` (docstrings and comments), `new` (none before), or the lines that differ."""
    if new[1].replace(new[0] or "-", "") == old[1].replace(old[0] or "-", ""):
        return "same"
    if new[0] and not old[0]:
        return "new"
    if not new[0]:
        return f"- {old[1][:200]}\n+ {new[1][:200]}"
    before, after = (code_of(x[1], less).splitlines() for x in (old, new))
    lines = difflib.unified_diff(before, after, lineterm="", n=0)
    return "\n".join([*lines][2:14]) or "words"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("revision", nargs="?", default="HEAD")
    parser.add_argument("--renew", action="store_true", help="renew digests under tuned/")
    parser.add_argument(
        "--less", type=lambda x: x.split(","), default=[], metavar="NAMES", help="not compared"
    )
    parser.add_argument("--list", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        json.dump(render_all(json.load(sys.stdin)), sys.stdout)
        return 0
    os.environ["GDN2GEN_UNVERIFIED"] = "1"  # what an older revision may refuse
    given = [*cases()]
    old, new = rendered_at(args.revision, given), render_all(given)
    counts: Counter[str] = Counter()
    # by op, gate and digest, which is one of a template's files, whatever they make of them
    renewed: dict[Filed, str] = {}
    changed: dict[Filed, str] = {}
    for case, before, after in zip(given, old, new, strict=True):
        result = compared(before, after, args.less)
        filed = case["problem"]["op"], case["problem"]["gate"], before[0]
        counts[result if result in ("same", "words", "new") else "other"] += 1
        if result in ("same", "words"):
            renewed[filed] = after[0]
        elif result != "new":
            changed.setdefault(filed, f"{case['stage']} {_label(case)}\n{result}")
    print(
        f"{len(given)} kernels: {counts['same']} the same, {counts['words']} but for docstrings "
        f"and comments, {counts['new']} new, {counts['other']} changed since {args.revision}"
    )
    for text in changed.values():
        print(f"\n{text}")
    if args.renew:
        _renew({x: y for x, y in renewed.items() if x not in changed and x[2] != y})
    return bool(changed)


def _label(case: Case) -> str:
    problem = case["problem"]
    usual = asdict(Problem())
    told = [f"{x}={y}" for x, y in problem.items() if y != usual[x]]
    return " ".join([*told, *(f"{x}={y}" for x, y in case["knobs"].items())])


def _renew(renewed: dict[Filed, str]) -> None:
    """Put the new digests where the old ones are filed; entries that were stale stay so."""
    for path in sorted((ROOT / "tuned").glob("*/*.json")):
        old = path.read_text()
        parts = re.split(r'(?="problem": )', old)  # an entry each, after the head
        for i, part in enumerate(parts):
            gate = re.search(r'"gate": "(\w+)"', part)
            for (op, of, before), after in renewed.items():
                if gate is not None and (op, of) == (path.parent.name, gate[1]):
                    parts[i] = parts[i].replace(f'"{before}"', f'"{after}"')
        if (text := "".join(parts)) != old:
            replace_file(path, text)
            print(f"{path.relative_to(ROOT)}: digests renewed")


if __name__ == "__main__":
    sys.exit(main())
