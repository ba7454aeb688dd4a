"""Our layers of Mamba with mamba_ssm's op in the place of ours.

mamba_ssm's own layers want its compiled extensions and causal_conv1d; its ops are Triton and torch
alone. So the projections, the short convolution, the norms and the decays are ours on both sides,
and what differs is the op. A call with a cache, or with packed sequences, is ours: training has
neither, and the observatory's look at the states, which has, counts in no time.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gdn2gen.measure.peers import mamba3_op, mamba_ssm_op
from gdn2gen.nn import Mamba2, Mamba3
from gdn2gen.nn._batch import Batch


class TheirMamba2(Mamba2):
    """Mamba-2's layer on `mamba_chunk_scan_combined`, in chunks of 256, as mamba_ssm's layer has
    them.

    Raises UnsupportedError where it cannot be imported.
    """

    def __init__(self, hidden_size: int, **options: Any) -> None:
        super().__init__(hidden_size, **options)
        self._op = mamba_ssm_op("mamba2")

    def _scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dt: Tensor,
        z: Tensor | None,
        batch: Batch,
        kept: dict[str, Tensor] | None,
        trains: bool,
    ) -> Tensor:
        if kept is not None or batch.cu_seqlens is not None:
            return super()._scan(q, k, v, dt, z, batch, kept, trains)
        dt, bias, bounded = self._limited(dt)
        y, _ = self._op(
            q=q,
            k=k,
            v=v,
            dt=dt,
            use_gate_in_kernel=not bounded,
            rate=-self.A_log.exp(),
            dt_bias=bias,
            # one number a head, for which it has less to add up than for one a channel
            D=self.D,
            z=z,
        )
        return y


class TheirMamba3(Mamba3):
    """Mamba-3's layer on `mamba3_siso_combined`, in its chunks of 64.

    Raises UnsupportedError where it cannot be imported.
    """

    def __init__(self, hidden_size: int, **options: Any) -> None:
        super().__init__(hidden_size, **options)
        self._op = mamba3_op("mamba_ssm")

    def _scanned(
        self, given: dict[str, Tensor | None], batch: Batch, kept: dict[str, Tensor] | None
    ) -> Tensor:
        if kept is not None or batch.cu_seqlens is not None:
            return super()._scanned(given, batch, kept)
        y: Tensor = self._op(**given)
        return y
