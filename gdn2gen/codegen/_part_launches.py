"""Launches of stages that are in no plan, in the order of their list, for a package's host code.

Which launches there are, of what and into what, follows from the stages' operands: a stage reads
what a call is given, or what a stage before it made under the same name. Those of the backward
follow from what arrives there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from gdn2gen.base.errors import TemplateError
from gdn2gen.family.parts import PartProblem
from gdn2gen.kernels.parts import PartStage
from gdn2gen.kernels.stage import Operand


@dataclass(frozen=True)
class Launch:
    """One stage of a call."""

    module: str
    tensors: tuple[str, ...]
    """In the order of the kernel's arguments, inputs first."""
    scalars: tuple[str, ...]
    makes: tuple[Operand, ...]
    problem: PartProblem
    """What is compiled into it."""

    @property
    def reads(self) -> tuple[str, ...]:
        return self.tensors[: len(self.tensors) - len(self.makes)]


def launches_of(
    stages: Sequence[PartStage],
    own_problem: Callable[[PartStage], PartProblem],
    given: Collection[str],
    arriving: Collection[str],
) -> tuple[list[Launch], list[Launch]]:
    """The forward's and the backward's. `given`: names that a call begins with; `arriving`: those
    that its backward gets beside them. A stage that makes nothing for its problem is left out.

    Raises TemplateError for an operand that nobody makes.
    """
    forward: list[Launch] = []
    backward: list[Launch] = []
    known, later = {*given}, {*arriving}
    for stage in stages:
        problem = own_problem(stage)
        operands = stage.operands(problem)
        outputs = {x.name for x in stage.outputs}
        read = [x.name for x in operands if x.name not in outputs]
        makes = tuple(x for x in operands if x.name in outputs)
        if not makes:
            continue
        unknown = [x for x in read if x not in known | later]
        if unknown:
            raise TemplateError(
                f"{stage.name} reads {', '.join(unknown)}, which no call is given and no stage "
                f"before it makes: a package knows {', '.join(sorted(known | later))}"
            )
        names = tuple([*read, *(x.name for x in makes)])
        launch = Launch(stage.name, names, stage.scalars_of(problem), makes, problem)
        back = any(x in later for x in read)
        (backward if back else forward).append(launch)
        (later if back else known).update(x.name for x in makes)
    return forward, backward


def summed(operand: Operand, dims: str) -> str:
    """The expression of a gradient with these dims, from what a stage makes in parts.

    Raises TemplateError where it lacks one of them.
    """
    have, wanted = operand.dims.split(), dims.split()
    parts = [i for i, symbol in enumerate(have) if symbol not in wanted]
    if [x for x in have if x in wanted] != wanted:
        raise TemplateError(f"{operand.name} [{operand.dims}] is no gradient of [{dims}] in parts")
    if not parts:
        return operand.name
    return f"{operand.name}.sum({parts[0] if len(parts) == 1 else tuple(parts)})"
