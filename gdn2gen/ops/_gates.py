"""The gate of a decay before a call that reads the decay itself."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gdn2gen.ops.decay_gate import decay_gate, known_gate_of, prepared
from gdn2gen.runtime.decay_gate import KnownGate
from gdn2gen.runtime.signature import Signature


class Gate:
    """Of calls of one kind: the tensors of the call without a gate, from those with."""

    def __init__(self, signature: Signature, lower_bound: float | None) -> None:
        self._place, self._bound = signature.gate, lower_bound
        self._by_channel = signature.by_channel
        self._A_log, self._dt_bias = (signature.gate_parameters[x] for x in ("A_log", "dt_bias"))
        self._call: KnownGate | None = None

    def __call__(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        x, A_log, dt_bias = (tensors[i] for i in (self._place, self._A_log, self._dt_bias))
        assert x is not None
        found = [*tensors]
        found[self._A_log] = found[self._dt_bias] = None
        found[self._place] = self._gate(x, A_log, dt_bias)
        return tuple(found)

    def _gate(self, x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> Tensor:
        if not self._by_channel:
            return decay_gate(x[..., None], A_log, dt_bias, lower_bound=self._bound)[..., 0]
        if self._call is None:
            self._call = known_gate_of(x, A_log, dt_bias, self._bound)
        if self._call is None:
            return decay_gate(x, A_log, dt_bias, lower_bound=self._bound)
        return self._call(*prepared(x, A_log, dt_bias, self._bound))
