"""How far from the exact result a kernel may be, for verify, the tuner and what is filed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# Relative error against fp64 (norm of the difference over norm of the reference) that a kernel may
# have, by dtype of its inputs. Worst found on an H200: see docs/results.
LIMITS: Final = {"bf16": 1e-2, "fp16": 4e-3, "fp32": 1e-4}
# Keys correlated at 0.9 with b near 2 make I + T ill-conditioned: what 16 bits round off in T and A
# comes back amplified. Measured 2.6 times the other regimes' worst here, 3.5 in a peer.
_AMPLIFIED: Final = {"correlated": 3.0}
# One value per head, a sum over all tokens and channels. Under a sigmoid gate its terms have either
# sign: what rounding one score leaves goes alike into all channels, 0.7e-2 to 1.2e-2 of the root of
# the terms' squares by the bf16 interpreter, and 1.4e-2 to 2.1e-2 of the sum was seen on an H200.
CANCELLING: Final = {"dA_log": 3.0}


def limit_of(dtype: str, regime: str) -> float:
    """Relative error that outputs and gradients may have in a regime of `inputs.REGIMES`."""
    return LIMITS[dtype] * _AMPLIFIED.get(regime, 1.0)


def over(errors: Mapping[str, float], limit: float) -> dict[str, float]:
    """The errors above `limit`, NaN among them; sums that cancel have more of it."""
    return {name: x for name, x in errors.items() if not x <= limit * CANCELLING.get(name, 1.0)}


def widest_limit(dtype: str) -> float:
    """What `limit_of` allows in the regime where it allows most."""
    return LIMITS[dtype] * max(1.0, *_AMPLIFIED.values())
