"""(problem, stage, config) -> readable source of one kernel. The only user of jinja2."""

from __future__ import annotations

import hashlib
import re
import textwrap
from dataclasses import dataclass
from functools import cache
from typing import Final

import jinja2
from jinja2 import meta

from gdn2gen.base import environment
from gdn2gen.base.errors import ConfigError, TemplateError
from gdn2gen.base.paths import templates_dir
from gdn2gen.family.problem import OPTIONAL_FLAGS, Problem
from gdn2gen.kernels.anchors import anchor_range, chunk_loss
from gdn2gen.kernels.config import Config, language_of
from gdn2gen.kernels.stages import STAGES, Stage
from gdn2gen.kernels.validity import why_invalid

LANGUAGES = ("triton", "tilelang")
# Values of knobs that have templates of their own, beside the stage's first one.
FORMS = ("anchored", "parallel")
# Values that leave out some of another one's template.
_FORM_OF = {"bounded": "anchored"}


@dataclass(frozen=True)
class Rendered:
    """Source of one stage, and the digest of the template files it came from."""

    stage: str
    source: str
    digest: str

    @property
    def module_name(self) -> str:
        content = hashlib.sha256(self.source.encode()).hexdigest()[:12]
        return f"gdn2_{self.stage}_{content}"


@cache
def templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_dir()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def template_name(stage: Stage, config: Config) -> str:
    """The template that serves the config's language and form."""
    values = {_FORM_OF.get(str(x), x) for x in config.values()}
    form = next((x for x in FORMS if x in values), "")
    return f"{language_of(config)}/{stage.template}{form and '_' + form}.py.jinja"


def template_digest(config: Config) -> str:
    """Digest of the template that serves `config`, and of what it imports: 16 hex digits."""
    return _digest(frozenset({template_name(STAGES[config.stage], config)}))


def stage_digest(stage_name: str) -> str:
    """Digest of all templates that may serve a stage, in any language and form."""
    template = STAGES[stage_name].template
    forms = ("", *(f"_{form}" for form in FORMS))
    names = {f"{language}/{template}{form}.py.jinja" for language in LANGUAGES for form in forms}
    return _digest(frozenset(name for name in names if (templates_dir() / name).exists()))


@cache
def _digest(names: frozenset[str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(names.union(*map(_imported, names))):
        digest.update(name.encode() + b"\0" + (templates_dir() / name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _imported(name: str) -> set[str]:
    """Templates that `name` imports, and that those import."""
    source = (templates_dir() / name).read_text()
    found = {x for x in meta.find_referenced_templates(templates().parse(source)) if x}
    return found | {further for other in found for further in _imported(other)}


def context(problem: Problem, stage: Stage, config: Config) -> dict[str, object]:
    """Everything that a template may refer to."""
    common = {
        "problem": problem,
        "stage": stage,
        "config": config,
        "operands": [x.name for x in stage.operands(problem)],
        # of a forward scan, beside the state: "o", "h" (with R), or both
        "makes": "".join(x.name for x in stage.outputs if x.name in ("o", "h")),
        "digest": template_digest(config),
        "regenerate": _regenerate_command(problem, stage, config),
    }
    if language_of(config) == "tilelang":
        return common | _triton_context(problem, config) | _tilelang_context(problem, stage, config)
    return common | _triton_context(problem, config) | {"operand_dtype": _operand_dtype(problem)}


def _triton_context(problem: Problem, config: Config) -> dict[str, object]:
    """For Triton kernels, which modules in either language may hold."""
    levels = []
    size = config.size("BT")
    while size > 1:
        levels.append(size)
        size //= 2
    return {
        "levels": levels,
        "solve": _solve_precision(str(config.get("solve", "ieee"))),
        # of products of states, which are in fp32
        "states": _solve_precision("tf32x3" if problem.dtype == "fp32" else "bf16x3"),
        "io_dtype": _TRITON_DTYPE[problem.dtype],
        "gate_dtype": _TRITON_DTYPE[problem.gate_dtype],
        "precise": ', input_precision="tf32x3"' if problem.dtype == "fp32" else "",
        "anchor_range": anchor_range(problem, config.stage),
        "chunk_loss": chunk_loss(problem, config.size("BT")),
        # grad_key's scratch for the cumulative decay is then the buffer of dg
        "shares_dg": problem.gate_dtype == "fp32",
    }


def _tilelang_context(problem: Problem, stage: Stage, config: Config) -> dict[str, object]:
    sizes = {"N+1": "N1"} if problem.varlen else {"N": "B"}
    tensors = []
    for operand in stage.operands(problem):
        if operand.is_idle(config):
            continue
        dims = [sizes.get(symbol, symbol) for symbol in operand.dims.split()]
        if problem.state_v_first and dims[-2:] == ["K", "V"]:
            dims[-2:] = ["V", "K"]
        tensors.append((operand.name, dims, _TILE_DTYPE[operand.dtype_in(problem)]))
    symbols = dict.fromkeys(x for _, dims, _ in tensors for x in dims)
    return {
        "tensors": tensors,
        "symbols": [x for x in symbols if x not in ("K", "V", "BT") and not x.isdigit()],
        "sequences": "(N1 - 1)" if problem.varlen else "B",
        "tile_dtype": _TILE_DTYPE[problem.dtype],
        "gate_tile_dtype": _TILE_DTYPE[problem.gate_dtype],
    }


def render(problem: Problem, stage_name: str, config: Config) -> Rendered:
    """Render one stage. The same arguments give the same bytes."""
    stage = STAGES[stage_name]
    if config.stage != stage_name:
        raise ConfigError(f"config is of stage {config.stage!r}, but {stage_name!r} is rendered")
    reason = why_invalid(config, problem)
    if reason is not None:
        raise ConfigError(f"{stage_name} [{config}] cannot serve this problem: {reason}")
    name = template_name(stage, config)
    try:
        text = templates().get_template(name).render(context(problem, stage, config.of_kernel))
    except jinja2.TemplateError as error:
        raise TemplateError(f"{name}: {error}") from error
    source = _tidy(text)
    try:
        compile(source, name, "exec")
    except SyntaxError as error:
        raise TemplateError(
            f"{name} rendered to something that is not Python: line {error.lineno}: {error.msg}"
        ) from error
    return Rendered(stage_name, source, template_digest(config))


TABLES_TEMPLATE: Final = "triton/chunk_tables.py.jinja"
"""What a packed batch needs beside its stages; not tuned."""
# Two programs to a multiprocessor of an H200, to clear what no sequence covers.
_SPREAD: Final = 264


def render_tables(problem: Problem, BT: int) -> Rendered:
    """The kernels that find the chunks of a packed batch, and clear what no sequence covers."""
    digest = _digest(frozenset({TABLES_TEMPLATE}))
    command = _wrapped_command([*_problem_words(problem), "--out DIR"])
    text = (
        templates()
        .get_template(TABLES_TEMPLATE)
        .render(
            problem=problem,
            BT=BT,
            # the interpreter runs programs one after another, each for some 10 ms
            spread=1 if environment.interpreted() else _SPREAD,
            digest=digest,
            regenerate=command,
        )
    )
    return Rendered("chunk_tables", _tidy(text), digest)


def _tidy(text: str) -> str:
    """At most two blank lines in a row at the top level, and one inside functions."""
    text = re.sub(r"\n{3,}(?=[ ])", "\n\n", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).rstrip() + "\n"


_TILE_DTYPE = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "int32": "int32"}
_TRITON_DTYPE = {"bf16": "tl.bfloat16", "fp16": "tl.float16", "fp32": "tl.float32"}


def _operand_dtype(problem: Problem) -> str:
    """dtype of the operands of the score products.

    With l2norm in the kernel |q|, |k| <= 1 and every decay factor is <= 1, so fp16 cannot overflow
    and carries 3 more bits than bf16.
    """
    if problem.dtype == "bf16" and problem.l2norm:
        return "tl.float16"
    return _TRITON_DTYPE[problem.dtype]


def _solve_precision(solve: str) -> str:
    # Triton's interpreter multiplies exactly, and knows no bf16x3
    return "ieee" if solve == "bf16x3" and environment.interpreted() else solve


def _regenerate_command(problem: Problem, stage: Stage, config: Config) -> str:
    knobs_given = ",".join(f"{name}={value}" for name, value in config.knobs)
    # no other kernel depends on the bound
    bound = problem.bound if config.get("decay") == "bounded" else 0
    words = _problem_words(problem, bound)
    return _wrapped_command([*words, f"--stage {stage.name} --config {knobs_given}"])


def _problem_words(problem: Problem, bound: int = 0) -> list[str]:
    words = [
        f"gdn2gen generate --op {problem.op} --head-dim {problem.K},{problem.V}",
        f"--dtype {problem.dtype} --gate-dtype {problem.gate_dtype} --gate {problem.gate}",
    ]
    if not problem.l2norm:
        words.append("--no-l2norm")
    if bound:
        words.append(f"--lower-bound -{bound}")
    given = [x.removeprefix("has_") for x in OPTIONAL_FLAGS if getattr(problem, x)]
    return [*words, f"--with={','.join(given)}"]


def _wrapped_command(words: list[str]) -> str:
    return textwrap.fill(
        " ".join(words), 92, subsequent_indent=" " * 6, break_long_words=False
    ).replace("\n", " \\\n")
