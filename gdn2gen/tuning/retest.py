"""Try refused configs again: what passes now is taken out of the ledger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gdn2gen.base.device import Device
from gdn2gen.tuning import space
from gdn2gen.tuning.gpu.attempt import try_recipe
from gdn2gen.tuning.gpu.backend import Backend
from gdn2gen.tuning.records.ledger import PIPELINE, Ledger, Refusal


@dataclass(frozen=True)
class Retested:
    """A refusal, and why it is refused again; `reason` is empty if it passed."""

    refusal: Refusal
    reason: str

    @property
    def passed(self) -> bool:
        return not self.reason


def why_not_in_force(refusal: Refusal, ledger: Ledger) -> str:
    """What changed since a refusal was filed, so that it is no longer heeded; empty if nothing."""
    digest = refusal.present_digest
    if digest is None:
        return "its knobs or stages are gone"
    if digest != refusal.digest:
        return "its templates changed"
    if refusal.gpu != ledger.gpu:
        return f"it is of the {refusal.gpu}"
    changed = sorted(
        name
        for name in {*refusal.toolchain, *ledger.toolchain}
        if refusal.toolchain.get(name) != ledger.toolchain.get(name)
    )
    return f"{', '.join(changed)} changed" if changed else ""


def retest(
    refusals: Sequence[Refusal], ledger: Ledger, backend: Backend, device: Device
) -> Iterator[Retested]:
    """Compile, look at the resources, and check each refusal as the search does.

    What passes is cleared from the ledger at once. A trial that could not be made for reasons of
    its own (out of memory, an error of this program) leaves the refusal as it is.
    """
    for refusal in refusals:
        reason = _try(refusal, backend, device)
        if not reason:
            ledger.clear(refusal)
        yield Retested(refusal, reason)


def _try(refusal: Refusal, backend: Backend, device: Device) -> str:
    """Why the refusal stands, or nothing."""
    if refusal.present_digest is None:
        return "its knobs or stages are gone, so there is nothing to try"
    recipe = refusal.recipe
    whole = refusal.stage == PIPELINE
    configs = recipe.configs if whole else (recipe[refusal.stage],)
    for config in configs:
        hopeless = space.why_hopeless(config, recipe.problem, device)
        if hopeless is not None:
            return hopeless
    compiles = {config: backend.compile(recipe.problem, config) for config in configs}
    tried = try_recipe(recipe, compiles, backend, device, full=whole)
    return "" if tried.ok else tried.reason
