"""What is known of kernels before they go into a package."""

from __future__ import annotations

from dataclasses import dataclass

from gdn2gen.codegen.build import Resources


@dataclass(frozen=True)
class Proof:
    """How kernels compiled, and how far off their results are."""

    resources: dict[str, Resources]
    """By stage, for the target."""
    instead: dict[str, str]
    """Stages that run another config, the default or one beside it, and why not what was wanted."""
    where: str
    """The GPU that the results were checked on, or what was there instead of one."""
    errors: dict[str, float]
    """Worst relative error of each output and gradient against the fp64 reference."""

    @property
    def words(self) -> str:
        """One paragraph of it, for a reader."""
        spilled = max(x.spill_bytes for x in self.resources.values())
        shared = max(x.shared_bytes for x in self.resources.values())
        name, error = max(self.errors.items(), key=lambda x: x[1])
        said = [
            f"compiled: {len(self.resources)} stages, at most {shared} bytes of shared memory and "
            f"{spilled} spilled a thread",
            f"checked on {self.where}: worst {name}, off by {error:.1e}",
        ]
        said += [
            f"{stage} runs the default, or what beside it fits or spills least: {why}"
            for stage, why in self.instead.items()
        ]
        return "\n".join(said)
