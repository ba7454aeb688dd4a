"""Calls over a few tokens of each sequence: one launch, and all that leads to it looked up once.

What the shapes, strides, dtypes and flags of a call decide is a `Plan`: that they are right, its
kernel, with a config by a rule from the sizes, and the kernel's scalars. A later call of the same
kind looks it up and launches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import prod
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from gdn2gen.base.device import Device
from gdn2gen.base.errors import InputError
from gdn2gen.family.decoding import DecodingProblem
from gdn2gen.family.registry import recurrence_named
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.operands import OUTPUT
from gdn2gen.kernels.recurrent import RECURRENT, knobs_for
from gdn2gen.kernels.rows import UNIT, is_row_wise, row_of
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.runtime._loading import fixed_launcher
from gdn2gen.runtime.arguments import Dims, check_narrow
from gdn2gen.runtime.decoding_checks import SERVING, check_decoding
from gdn2gen.runtime.head_dims import check_head_dims
from gdn2gen.runtime.layout import strides_of
from gdn2gen.runtime.lookup import device_of, make_problem
from gdn2gen.runtime.passes import maker
from gdn2gen.runtime.signature import Options, Signature
from gdn2gen.store.decoding import nearest_of_each
from gdn2gen.store.surroundings import Surroundings
from gdn2gen.store.surroundings import surroundings as of_look_ups

Lay = Literal[True] | tuple[torch.layout, tuple[int, ...]]
"""How a tensor lies in memory: True for rows without gaps, else its layout and strides."""


class Strided(NamedTuple):
    """What of a tensor decides how a kernel reads it."""

    shape: torch.Size
    dtype: torch.dtype
    stride: tuple[int, ...]

    @classmethod
    def of(cls, shape: torch.Size, dtype: torch.dtype, lay: Lay) -> Strided:
        return cls(shape, dtype, strides_of(shape) if isinstance(lay, bool) else lay[1])


def _layout(lay: Lay) -> torch.layout:
    return torch.strided if isinstance(lay, bool) else lay[0]


_O: Final = tuple(OUTPUT.dims.split())
BUFFERS: Final = ("ssm_state_indices", "num_accepted_tokens", "state_pool", "o", "final_state")
"""What the torch op takes after the tensors of the signature."""


@dataclass(frozen=True, eq=False)
class Plan:
    """One kind of call, checked, with its kernel."""

    dims: Dims
    problem: DecodingProblem
    config: Config
    launch: Callable[..., None] | None
    """None where there is nothing to compute."""
    places: tuple[int, ...]
    """The kernel's operands among the tensors of `run`."""
    copied: tuple[int, ...]
    """Those that no kernel could read as they lie."""
    device: torch.device
    cu_seqlens: int
    """Its place among the tensors of `run`."""
    make_o: Callable[[], Tensor]
    make_final: Callable[[], Tensor] | None

    def run(self, tensors: list[Tensor | None], *, known: bool = False) -> None:
        """Launch on the current device. `tensors` are those of the signature, and `BUFFERS`;
        `known`: none of them is negated lazily."""
        if self.copied:
            for place in self.copied:
                tensors[place] = _copy(tensors[place])
        if self.launch is None:
            if self.dims.N == 0:  # no program is there to write what no sequence covers
                _given(tensors[-2]).zero_()
            return
        operands: list[Any] = [tensors[place] for place in self.places]
        # values that torch negates where it reads them
        if not known and any(map(Tensor.is_neg, operands)):
            operands = [_copy(x) if x.is_neg() else x for x in operands]
        self.launch(*operands)


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _copy(x: Tensor | None) -> Tensor:
    return torch.clone(_given(x), memory_format=torch.contiguous_format)


def decoding_name(signature: Signature) -> str:
    """What such an op's head dims are verified by: its public name."""
    return str(recurrence_named(signature.op).public.recurrent)


def make_plan(
    signature: Signature,
    options: tuple[Any, ...],
    null_slot: int | None,
    device: torch.device,
    read: Read,
    *given: tuple[torch.Size, torch.dtype, Lay] | None,
) -> Plan:
    """`options` are `Options`; `given` says of the tensors of the signature and of `SERVING`, all
    on `device`, their shapes, dtypes, and how they lie in memory. `read`: the `surroundings`.
    Raises InputError.
    """
    flags, count = Options(*options), len(signature.names)
    seen = [None if x is None else (x[0], x[1], device, _layout(x[2])) for x in given]
    dims = check_decoding(signature, flags.state_v_first, null_slot, seen[:count], seen[count:])
    q_dtype = seen[0][1]  # type: ignore[index]  # checked
    name = decoding_name(signature)
    check_head_dims(name, q_dtype, device, dims.K, dims.V, read[2])
    names = (*signature.names, *SERVING)
    tensors = {x: Strided.of(*y) for x, y in zip(names, given, strict=True) if y is not None}
    shown = dict(zip(signature.names, signature.shown, strict=True))
    for name in (
        *(signature.names[x] for x in (0, signature.gate, *signature.states)),
        "state_pool",
    ):
        if name in tensors:
            check_narrow(shown.get(name, name), tensors[name].dtype)
    if "out" in tensors:
        tensors["o"] = tensors.pop("out")
    rows = _Rows.of(signature, tensors, dims)
    problem = _problem(signature, flags, tensors, dims, strided=rows.strided)
    config = config_for(problem, dims, device, read)
    v, initial = tensors["v"], tensors.get("initial_state")
    o_dtype, state_dtype = v.dtype, torch.float32 if initial is None else initial.dtype
    inner = (dims.V, dims.K) if flags.state_v_first else (dims.K, dims.V)
    order = (*signature.names, *BUFFERS)
    operands = [x.name for x in RECURRENT.operands(problem)]
    launch = None
    if dims.N * dims.HV > 0 and (dims.T > 0 or problem.final_state):
        scalars = _scalars(problem, flags, null_slot, tensors, dims) | rows.scalars
        wanted = {x: scalars[x] for x in RECURRENT.scalars_of(problem)}
        launch = fixed_launcher(problem, config, {"n_sequences": dims.N, **wanted})
    return Plan(
        dims,
        problem,
        config,
        launch,
        tuple(map(order.index, operands)),
        tuple(map(order.index, (*rows.copied, *_scattered(signature, tensors)))),
        device,
        len(signature.names) - 1,
        maker(tuple(v.shape), o_dtype, device),
        maker((dims.N, dims.HV, *inner), state_dtype, device) if problem.final_state else None,
    )


# typed: a null_slot of True is refused, though it is equal to 1
known_plan = lru_cache(maxsize=2048, typed=True)(make_plan)


_forced: Config | None = None
_knobs: tuple[tuple[str, Knob], ...] = ()


def force(config: Config | None = None, **knobs: Knob) -> None:
    """Have all calls of this process run this config, or the rule's with these knobs where a kernel
    takes them, as measuring wants; without either that ends."""
    global _forced, _knobs
    _forced, _knobs = config, tuple(sorted(knobs.items()))
    known_plan.cache_clear()


Read = tuple[Config | None, tuple[tuple[str, Knob], ...], tuple[Any, ...]]


def surroundings() -> Read:
    """What the plan of a call depends on besides its arguments: what `force` says, and what all
    look-ups depend on."""
    return _forced, _knobs, of_look_ups()


def config_for(
    problem: DecodingProblem, dims: Dims, device: torch.device, read: Read | None = None
) -> Config:
    """The config of a call: what is on file for it, else the default in tiles by `knobs_for`.
    `read`: the `surroundings`, where they were read before.

    Raises ConfigError where a forced one cannot serve it (`render`).
    """
    forced, knobs, around = surroundings() if read is None else read
    if forced is not None:
        return forced
    gpu = device_of(device)
    found = config_at(problem, dims.N, dims.HV, gpu, Surroundings.of(around))
    for name, value in knobs:
        changed = found.replace(**{name: value})
        found = changed if why_invalid(changed, problem) is None else found
    return found


# How many sequences count where results may not depend on it.
_ANY_BATCH: Final = 32


def config_at(
    problem: DecodingProblem,
    sequences: int,
    heads: int,
    gpu: Device,
    around: Surroundings | None = None,
) -> Config:
    """The same by the sizes, for a GPU that need not be here."""
    return configs_at(problem, sequences, heads, gpu, around)[0]


def configs_at(
    problem: DecodingProblem,
    sequences: int,
    heads: int,
    gpu: Device,
    around: Surroundings | None = None,
) -> tuple[Config, ...]:
    """What calls of such sizes may run: with the user's files, without them, and without any."""
    around = Surroundings.of() if around is None else around
    sequences = _ANY_BATCH if around.batch_invariant else sequences
    filed = nearest_of_each(problem, sequences * heads, gpu, around)
    return tuple(dict.fromkeys((*filed, by_rule(problem, sequences, heads, gpu))))


def by_rule(problem: DecodingProblem, sequences: int, heads: int, gpu: Device) -> Config:
    """What runs where nothing that is near is on file."""
    found = default_config(RECURRENT.name, problem, arch=gpu.arch)
    return found.replace(**knobs_for(problem, sequences, heads, gpu.sms))


def _problem(
    signature: Signature,
    flags: Options,
    tensors: Mapping[str, Strided],
    dims: Dims,
    *,
    strided: bool,
) -> DecodingProblem:
    dtypes = tuple(tensors[signature.names[place]].dtype for place in signature.typed_by)
    given = tuple(x in tensors for x in signature.names[signature.required :])
    of_chunks = make_problem(
        signature.op, dims.K, dims.V, dtypes, given, flags.lower_bound, *options_of(flags)
    )
    pool, indices = tensors.get("state_pool"), tensors.get("ssm_state_indices")
    state = pool or tensors.get("initial_state")
    return DecodingProblem(
        **asdict(of_chunks) | {"bound": 0, "final_state": flags.output_final_state and not pool},
        state_bf16=state is not None and state.dtype == torch.bfloat16,
        pool=pool is not None,
        indexed=indices is not None,
        speculative=indices is not None and len(indices.shape) == 2,
        accepted="num_accepted_tokens" in tensors,
        one_token=dims.T == 1 and "cu_seqlens" not in tensors,
        strided=strided,
        odd_slots=pool is not None and slot_stride_of(pool) % UNIT != 0,
        tied_D=_is_tied(tensors.get("D")),
    )


def options_of(flags: Options) -> tuple[Any, ...]:
    """Those of `make_problem`."""
    return (*flags[2:],)


def _scalars(
    problem: DecodingProblem,
    flags: Options,
    null_slot: int | None,
    tensors: Mapping[str, Strided],
    dims: Dims,
) -> dict[str, int | float]:
    """All but how far rows lie apart."""
    found: dict[str, int | float] = {
        "scale": problem.K**-0.5 if flags.scale is None else flags.scale,
        "lower_bound": flags.lower_bound or 0.0,
        "null_slot": -1 if null_slot is None else null_slot,
        "N": dims.N,
        "T": dims.T,
        "H": dims.H,
        "HV": dims.HV,
        "HG": dims.HG,
    }
    if "state_pool" in tensors:
        pool = tensors["state_pool"]
        stride = slot_stride_of(pool)
        found["slots"] = pool.shape[0]
        found["slot_stride"] = stride if problem.odd_slots else stride // UNIT
    if problem.tied_D:
        found["D_row"] = tensors["D"].stride[0]
    if "ssm_state_indices" in tensors:
        indices = tensors["ssm_state_indices"]
        width = prod(indices.shape[1:])
        found["index_width"] = width
        found["index_row"] = indices.stride[0] if _is_dense(indices, 1) else width
    return found


# Elements between numbers of D that kernels count in 32 bits, whatever the head.
_FAR: Final = 2**20


def _is_tied(D: Strided | None) -> bool:
    """Whether D is one number a head, repeated, and no farther apart than kernels count."""
    return D is not None and D.stride[1:] == (0,) and D.stride[0] <= _FAR


def slot_stride_of(pool: Strided) -> int:
    """Elements from slot to slot. Raises InputError for a pool that none can be written in."""
    size = prod(pool.shape[1:])
    stride = pool.stride[0] if pool.shape[0] > 1 else size
    if not _is_dense(pool, 1) or stride < size:
        raise InputError(
            "state_pool is written in place: heads, rows and columns of a slot must follow each "
            f"other, and slots must not overlap, but its strides are {pool.stride} for "
            f"{tuple(pool.shape)}"
        )
    return stride


def check_in_place(pool: Tensor | None, out: Tensor | None) -> None:
    """That both can be written where they lie, as kernels write them. Raises InputError."""
    if pool is not None:
        slot_stride_of(Strided(pool.shape, pool.dtype, pool.stride()))
    if out is not None:
        _out_row(Strided(out.shape, out.dtype, out.stride()), prod(out.shape[2:]))


def _out_row(x: Strided, plain: int) -> int:
    """Elements from row to row of `out`. Raises InputError where a kernel could not write them."""
    row = _row_stride(x, plain, UNIT)
    if row is None:
        raise InputError(
            "out is written in place: heads and channels of a row must follow each other, "
            f"rows begin at multiples of {UNIT} elements and not overlap, but its strides "
            f"are {x.stride} for {tuple(x.shape)}"
        )
    return row


def _is_dense(x: Strided, first: int) -> bool:
    """Whether the dims from `first` on follow each other in memory."""
    size = 1
    for length, stride in zip(reversed(x.shape[first:]), reversed(x.stride[first:]), strict=True):
        if length != 1 and stride != size:
            return False
        size *= length
    return True


def _scattered(signature: Signature, tensors: Mapping[str, Strided]) -> list[str]:
    """What has no row for each token, and no kernel could read as it lies."""
    names = [
        name
        for name, dims in zip(signature.names, signature.dims, strict=True)
        if not is_row_wise(" ".join(dims)) and not (name == "D" and _is_tied(tensors.get(name)))
    ]
    found = [x for x in (*names, "num_accepted_tokens") if x in tensors]
    scattered = [x for x in found if not _is_dense(tensors[x], 0)]
    if "ssm_state_indices" in tensors and not _is_dense(tensors["ssm_state_indices"], 1):
        scattered.append("ssm_state_indices")
    return scattered


class _Rows(NamedTuple):
    """How far the rows of tokens lie apart, in what has one for each token."""

    strided: bool
    """Whether further than they need to, in anything that is read as it lies."""
    copied: list[str]
    """What could not be: heads or channels that do not follow each other."""
    scalars: dict[str, int | float]

    @classmethod
    def of(cls, signature: Signature, tensors: Mapping[str, Strided], dims: Dims) -> _Rows:
        named = {**dict(zip(signature.names, signature.dims, strict=True)), "o": _O}
        row_wise = {name: len(x) for name, x in named.items() if is_row_wise(" ".join(x))}
        copied: list[str] = []
        scalars: dict[str, int | float] = {}
        strided = False
        for name, rank in row_wise.items():
            x, unit = tensors.get(name), UNIT if rank > 3 else 1
            plain = dims.HV * dims.V if x is None else prod(x.shape[2:])
            if x is not None and name == "o":
                row: int | None = _out_row(x, plain)
            else:
                row = plain if x is None else _row_stride(x, plain, unit)
            if row is None:
                copied.append(name)
                row = plain
            strided = strided or row != plain
            scalars[row_of(name)] = row // unit
        return cls(strided, copied, scalars)


def _row_stride(x: Strided, plain: int, unit: int) -> int | None:
    """Elements from token to token; None where it is not the same everywhere, or none that a kernel
    takes."""
    B, T = x.shape[:2]
    if B * T <= 1:
        return plain if _is_dense(x, 2) else None
    row = x.stride[0] if T == 1 else x.stride[1]
    even = B == 1 or T == 1 or x.stride[0] == T * x.stride[1]
    return row if even and row % unit == 0 and row >= plain and _is_dense(x, 2) else None
