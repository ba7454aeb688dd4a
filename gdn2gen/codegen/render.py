"""(problem, stage, config) -> readable source of one kernel."""

from __future__ import annotations

import hashlib
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import jinja2

from gdn2gen.base import environment
from gdn2gen.base.errors import ConfigError, TemplateError
from gdn2gen.codegen._rewriting import rewritten, with_extras
from gdn2gen.codegen.context import context
from gdn2gen.codegen.templates import templates, text_digest
from gdn2gen.family.compiled import Compiled
from gdn2gen.family.parts import PartProblem
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import recurrence_named
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.operands import OUTPUT
from gdn2gen.kernels.rows import UNIT
from gdn2gen.kernels.schedule import cleared_of
from gdn2gen.kernels.slices import covering
from gdn2gen.kernels.stage import Form, Operand, Stage
from gdn2gen.kernels.stages import EVERY_STAGE
from gdn2gen.kernels.validity import why_invalid


@dataclass(frozen=True)
class Rendered:
    """Source of one stage, and the digest of the template that it came from."""

    op: str
    stage: str
    source: str
    digest: str

    @property
    def module_name(self) -> str:
        content = hashlib.sha256(self.source.encode()).hexdigest()[:12]
        return f"{self.op}_{self.stage}_{content}"


def template_name(form: Form) -> str:
    """The template of a form, from the folder of all templates."""
    return f"{form.language}/stages/{form.template}.py.jinja"


def template_digest(config: Config) -> str:
    """Digest of what the template that serves `config` says, and its extras: 16 hex digits."""
    return with_extras(text_digest([template_name(config.form)]), config)


def stage_digest(stage_name: str) -> str:
    """The same of all templates that serve a stage, in any language and form."""
    return text_digest({template_name(form) for form in EVERY_STAGE[stage_name].forms})


def render(problem: Compiled, stage_name: str, config: Config) -> Rendered:
    """Render one stage. The same arguments give the same bytes."""
    stage = EVERY_STAGE[stage_name]
    if config.stage != stage_name:
        raise ConfigError(f"config is of stage {config.stage!r}, but {stage_name!r} is rendered")
    reason = why_invalid(config, problem)
    if reason is not None:
        raise ConfigError(f"{stage_name} [{config}] cannot serve this problem: {reason}")
    name = template_name(config.form)
    try:
        text = (
            templates()
            .get_template(name)
            .render(
                **context(problem, stage, config.of_kernel),
                digest=template_digest(config),
                regenerate=_regenerate_command(problem, stage, config.of_kernel),
            )
        )
    except jinja2.TemplateError as error:
        raise TemplateError(f"{name}: {error}") from error
    source = rewritten(_tidy(text), problem, config)
    try:
        if environment.interpreted():
            from gdn2gen.codegen.hasten import parse

            parse(source, name)
        else:
            compile(source, name, "exec")
    except SyntaxError as error:
        raise TemplateError(
            f"{name} rendered to something that is not Python: line {error.lineno}: {error.msg}"
        ) from error
    return Rendered(problem.op, stage_name, source, template_digest(config))


TABLES_TEMPLATE: Final = "triton/stages/chunk_tables.py.jinja"
"""What a packed batch needs beside its stages; not tuned."""
# Two programs to a multiprocessor of an H200, to clear what no sequence covers.
_SPREAD: Final = 264


def render_tables(problem: Problem, BT: int) -> Rendered:
    """The kernels that find the chunks of a packed batch, and clear what no sequence covers."""
    digest = text_digest([TABLES_TEMPLATE])
    cleared = cleared_of(problem)
    command = _wrapped_command([*_problem_words(problem), "--out DIR"])
    text = (
        templates()
        .get_template(TABLES_TEMPLATE)
        .render(
            problem=problem,
            BT=BT,
            cleared=cleared,
            glossary=_cleared_words(cleared),
            # the interpreter runs programs one after another, each for some 10 ms
            spread=1 if environment.interpreted() else _SPREAD,
            digest=digest,
            regenerate=command,
        )
    )
    return Rendered(problem.op, "chunk_tables", _tidy(text), digest)


SLOTS_TEMPLATE: Final = "triton/stages/state_slots.py.jinja"
"""What goes between slots of a pool and the stages of a forward; not tuned."""


def render_slots(
    problem: Problem, *, indexed: bool, flagged: bool, checkpoints: bool, odd_slots: bool
) -> Rendered:
    """The kernels that read states out of slots of a pool, and put them back."""
    digest = text_digest([SLOTS_TEMPLATE])
    text = (
        templates()
        .get_template(SLOTS_TEMPLATE)
        .render(
            problem=problem,
            indexed=indexed,
            flagged=flagged,
            checkpoints=checkpoints,
            covering=covering(problem.V),
            slot_unit="" if odd_slots else f" * {UNIT}",
            digest=digest,
        )
    )
    return Rendered(problem.op, "state_slots", _tidy(text), digest)


def _cleared_words(gradients: Iterable[Operand]) -> list[str]:
    """Lines on the output and the gradients, those of the same dims in one."""
    rows: dict[str, list[str]] = {}
    for x in sorted(gradients, key=lambda x: x.dims):
        rows.setdefault(x.dims, []).append(x.name)
    found = []
    for dims, names in rows.items():
        words = "gradients" if len(names) > 1 else "a gradient"
        if dims == OUTPUT.dims:
            names = [OUTPUT.name, *names]
            words = f"the output, and {words}"
        shape = f"[{', '.join(['1', *dims.split()[1:]])}]"
        found.append(f"{', '.join(names):<17}{shape:<17}{words}")
    return found


def _tidy(text: str) -> str:
    """At most two blank lines in a row at the top level, and one inside functions."""
    text = re.sub(r"\n{3,}(?=[ ])", "\n\n", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).rstrip() + "\n"


def _regenerate_command(problem: Compiled, stage: Stage, config: Config) -> str:
    knobs_given = ",".join(f"{name}={value}" for name, value in config.knobs)
    if isinstance(problem, PartProblem):
        words = [f"gdn2gen generate --dtype {problem.dtype}", f"--with={','.join(problem.extras)}"]
        return _wrapped_command([*words, f"--stage {stage.name} --config {knobs_given}"])
    assert isinstance(problem, Problem)
    # no other kernel depends on the bound
    bound = problem.bound if config.get("decay") == "bounded" else 0
    words = _problem_words(problem, bound)
    return _wrapped_command([*words, f"--stage {stage.name} --config {knobs_given}"])


def _problem_words(problem: Problem, bound: int = 0) -> list[str]:
    words = [
        f"gdn2gen generate --op {problem.op} --head-dim {problem.K},{problem.V}",
        f"--dtype {problem.dtype}",
    ]
    member = recurrence_named(problem.op)
    if member.decay is not None:
        words.append(f"--gate-dtype {problem.gate_dtype} --gate {problem.gate}")
    if problem.l2norm != member.normalises:
        words.append("--no-l2norm")
    if bound:
        words.append(f"--lower-bound -{bound}")
    return [*words, f"--with={','.join(problem.extras)}"]


def _wrapped_command(words: list[str]) -> str:
    return textwrap.fill(
        " ".join(words), 92, subsequent_indent=" " * 6, break_long_words=False
    ).replace("\n", " \\\n")
