"""What other libraries have of a recurrence, called as ours is: the other side of a benchmark."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final

from torch import Tensor

from gdn2gen.base.errors import UnsupportedError
from gdn2gen.family.mamba3_problem import MAMBA3
from gdn2gen.family.registry import STEP_OPS, recurrence_named
from gdn2gen.measure.accuracy import OpFunction

# Members that another library is faster at than flash-linear-attention.
_FASTER: Final = {"gated_delta_rule": ("flash_qla",)}
_NOT_OF_FLASH_QLA: Final = (
    *("use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval"),
    *("A_log", "dt_bias", "lower_bound"),
)
_MAMBA_SSM: Final = "mamba_ssm.ops.triton.ssd_combined"
_MAMBA3: Final = "mamba_ssm.ops.triton.mamba3.mamba3_siso_combined"
# Tokens of a chunk, as the layers of mamba_ssm pass them.
_CHUNK_SIZE: Final = 256


def peer_op(peer: str, op: str, level: str) -> OpFunction:
    """The op of a peer, `fla`, `flash_qla` or `mamba_ssm`, which need not be installed.

    Raises UnsupportedError where it is not, or has no such op.
    """
    if peer == "flash_qla":
        return flash_qla_op(op)
    return fla_op(op, level) if peer == "fla" else mamba_ssm_op(op)


@contextmanager
def untuned() -> Iterator[None]:
    """Inside, Triton's autotuners, as peers have them, take their first config, or search where
    that does not run, and forget it: errors want no fastest one, and a search takes minutes."""
    from triton.errors import TritonError
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run
    # by the tuner itself: another one may be made where one lay that is gone
    found: dict[Any, dict[Any, Any]] = {}

    def with_the_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept, self.cache = self.cache, found.setdefault(self, {})
        # its class's own, or its own
        prune, own = self.prune_configs, vars(self).get("prune_configs")
        self.prune_configs = lambda *given: [*prune(*given)][:1]
        try:
            return run(self, *args, **kwargs)
        except TritonError:
            self.cache.clear()
            self.prune_configs = prune
            return run(self, *args, **kwargs)
        finally:
            self.cache = kept
            vars(self).pop("prune_configs", None)
            if own is not None:
                self.prune_configs = own

    Autotuner.run = with_the_first
    try:
        yield
    finally:
        Autotuner.run = run


def any_peer(op: str, level: str) -> tuple[str | None, str]:
    """The fastest peer that has the op and can be imported here, or None and why there is none."""
    why = []
    for peer in ("mamba_ssm",) if op in STEP_OPS or op == MAMBA3 else (*_FASTER.get(op, ()), "fla"):
        try:
            mamba3_op(peer) if op == MAMBA3 else peer_op(peer, op, level)
        except UnsupportedError as error:
            why.append(str(error))
        else:
            return peer, ""
    return None, f"{op} is measured alone: {'; '.join(why)}"


def fla_op(op: str, level: str) -> OpFunction:
    """flash-linear-attention's op, told to recompute as `level` is; it may not be installed.

    Raises UnsupportedError then.
    """
    public = recurrence_named(op).public
    if not public.fla:
        raise UnsupportedError(f"flash-linear-attention has no {op}: leave `--vs fla` out")
    if op in _FASTER:
        # or it hands calls on to FlashQLA where that is installed, which is a peer of its own here
        os.environ.setdefault("FLA_FLASH_QLA", "0")
    try:
        function = getattr(import_module(public.fla), public.chunk)
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"the comparison needs flash-linear-attention with {public.fla} ({error}); "
            "run `pip install flash-linear-attention`, or leave `--vs fla` out"
        ) from error

    has_safe_gate = "safe_gate" in public.arguments

    def call(**arguments: Any) -> tuple[Tensor, Tensor | None]:
        # FLA takes a lower bound only together with its safe gate.
        safe = arguments.get("lower_bound") is not None
        fast = level == "fast"
        # FLA's ops swallow keywords that they do not know
        own = {"safe_gate": safe, "disable_recompute": fast} if has_safe_gate else {}
        o, state = function(**arguments, **own)
        return o, state

    return call


def flash_qla_op(op: str) -> OpFunction:
    """FlashQLA's op, which takes decay and beta as they are, of 16 bits and K = V = 128.

    Raises UnsupportedError where it is not installed, for any other recurrence than Gated DeltaNet,
    and in a call that asks for more.
    """
    if op not in _FASTER:
        raise UnsupportedError(f"flash_qla has no {op}: leave `--vs flash_qla` out")
    try:
        function = import_module("flash_qla").chunk_gated_delta_rule
    except Exception as error:  # it imports TileLang, which may be missing or of another version
        raise UnsupportedError(
            f"the comparison needs flash_qla ({type(error).__name__}: {error}); run `pip install "
            "flash-qla`, or leave `--vs flash_qla` out"
        ) from error

    def call(**arguments: Any) -> tuple[Tensor, Tensor | None]:
        own = {x: y for x, y in arguments.items() if x not in _NOT_OF_FLASH_QLA}
        more = [x for x in _NOT_OF_FLASH_QLA if arguments.get(x) not in (None, False)]
        q, v = arguments["q"], arguments["v"]
        served = q.shape[-1] == v.shape[-1] == 128 and q.element_size() == 2
        if more or not served:
            what = ", ".join(more) or f"K={q.shape[-1]}, V={v.shape[-1]} in {q.dtype}"
            raise UnsupportedError(
                f"flash_qla serves K = V = 128 in 16 bits, and no gate in its kernels, but {what} "
                "was asked for: leave `--vs flash_qla` out"
            )
        o, state = function(**own)
        return o, state

    return call


def mamba_ssm_op(op: str) -> OpFunction:
    """mamba_ssm's op, of which its Triton files alone have to be importable.

    Raises UnsupportedError where they are not, and for any other recurrence than Mamba-2.
    """
    if op != "mamba2":
        raise UnsupportedError(f"mamba_ssm has no {op}: leave `--vs mamba_ssm` out")
    try:
        function = import_module(_MAMBA_SSM).mamba_chunk_scan_combined
    except Exception as error:  # its modules import much that may be missing or of another version
        raise UnsupportedError(
            f"the comparison needs {_MAMBA_SSM} ({type(error).__name__}: {error}); install "
            "mamba-ssm, or unpack its sdist where Python finds it, or leave `--vs mamba_ssm` out"
        ) from error
    return as_mamba_ssm(function)


def mamba3_op(peer: str) -> Callable[..., Any]:
    """mamba_ssm's op of Mamba-3, with its arguments, of which its Triton files alone have to be
    importable.

    Raises UnsupportedError where they are not, and for any other peer.
    """
    if peer != "mamba_ssm":
        raise UnsupportedError(f"{peer} has no op of {MAMBA3}: leave `--vs {peer}` out")
    try:
        function = import_module(_MAMBA3).mamba3_siso_combined
    except Exception as error:  # its modules import much that may be missing or of another version
        raise UnsupportedError(
            f"the comparison needs {_MAMBA3} ({type(error).__name__}: {error}); install mamba-ssm, "
            "or unpack its sdist where Python finds it, or leave `--vs mamba_ssm` out"
        ) from error

    def call(**arguments: Any) -> Any:
        ends = arguments.get("cu_seqlens")
        return function(**arguments | ({} if ends is None else {"cu_seqlens": ends.int()}))

    return call


def as_mamba_ssm(function: Callable[..., Any]) -> OpFunction:
    """An op with mamba_ssm's arguments, called by the names of `chunk_mamba2`."""

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dt: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_gate_in_kernel: bool = False,
        rate: Tensor | None = None,
        dt_bias: Tensor | None = None,
        D: Tensor | None = None,
        z: Tensor | None = None,
        state_v_first: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if cu_seqlens is not None:
            raise UnsupportedError("packed sequences are compared by no benchmark of mamba2 yet")
        if initial_state is not None and not state_v_first:
            initial_state = initial_state.mT
        found = function(
            v,
            dt,
            -v.new_ones(v.shape[2], dtype=dt.dtype) if rate is None else rate,
            k,
            q,
            _CHUNK_SIZE,
            D=D,
            z=z,
            dt_bias=dt_bias,
            initial_states=initial_state,
            dt_softplus=use_gate_in_kernel,
            return_final_states=output_final_state,
        )
        if not output_final_state:
            return found, None
        o, state = found
        return o, state if state_v_first else state.mT

    return call
