"""mamba3_siso_combined beside its recurrence in fp64: every output and gradient."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any, Final

import pytest
import torch
from mamba3_reverse_scans import gradients as scanned_back
from mamba3_scans import recurrent as recurrent_scan
from torch import Tensor

from gdn2gen import mamba3_siso_combined, mamba3_siso_step
from gdn2gen.base.dtypes import DTYPE
from gdn2gen.base.environment import batch_invariant, verifying
from gdn2gen.base.errors import UnsupportedError
from gdn2gen.family.mamba3 import States, recurrent
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels import mamba3_reverse_scan, mamba3_scan
from gdn2gen.kernels.mamba3 import MAMBA3_AROUND, MAMBA3_STEP
from gdn2gen.kernels.mamba3_chunks import MAMBA3_CHUNK_STAGES
from gdn2gen.kernels.mamba3_reverse_scan import MAMBA3_REVERSE_SCAN, MAMBA3_SUMS
from gdn2gen.kernels.mamba3_scan import MAMBA3_SCAN
from gdn2gen.kernels.stage import Operand
from gdn2gen.kernels.stages import EVERY_STAGE
from gdn2gen.measure import mamba3_times
from gdn2gen.measure.accuracy import relative_errors
from gdn2gen.measure.mamba3_runs import mamba3_arguments, mamba3_results, pointing
from gdn2gen.measure.timing import Timing
from gdn2gen.ops import mamba3
from gdn2gen.runtime import arguments as arguments_of_ops
from gdn2gen.runtime import mamba3 as kernels
from gdn2gen.runtime import mamba3_chunk_ops, mamba3_chunks, mamba3_ops
from gdn2gen.runtime import mamba3_reverse_scan as runtime_reverse_scan
from gdn2gen.runtime.mamba3_chunk_ops import chunks_forced
from gdn2gen.runtime.mamba3_loaded import force, force_tile, loaded, tile_at
from gdn2gen.runtime.passes import poisoned
from gdn2gen.store.dispatch import reload

LIMIT: Final = 1e-5
CASES: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "layer": {"D": True, "Z": True, "states": True},
    "packed": {"cu_seqlens": (0, 0, 7, 8, 40, 40), "states": True, "Z": True},
    "packed-from-nothing": {"cu_seqlens": (0, 0, 7, 8, 40), "D": True},
    "strong": {"decay": 60.0, "states": True, "groups": 2},
    # at every token as much: the last one writes 5e8 times what is left of all before it
    "steady": {
        "nats": 20.0,
        "cu_seqlens": (0, 0, 1, 1, 18, 18, 35, 36),
        "states": True,
        "Z": True,
    },
    "no-angles": {"angles": 0, "states": True},
    "all-angles": {"angles": 12, "sizes": (4, 16, 24), "groups": 2},
    "one-token": {"T": 1, "states": True, "D": True},
}
# More tiles than sums over them take at once.
LONG: Final = {"cu_seqlens": (0, 265, 272), "sizes": (4, 16, 24), "Z": True, "states": True}
STATES: Final = States._fields
arguments: Final = mamba3_arguments


def draw(
    case: dict[str, Any], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Any]:
    """The op's arguments; of Input_States its tensors one by one, see `arguments`."""
    rng = torch.Generator().manual_seed(0)
    H, P, N = case.get("sizes", (2, 16, 24))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    cu_seqlens = case.get("cu_seqlens")
    b, T = 1 if cu_seqlens else case.get("rows", 2), case.get("T", 40)
    T = cu_seqlens[-1] if cu_seqlens and T else T
    S, groups, decay = case.get("angles", 6), case.get("groups", 1), case.get("decay", 1.0)
    DT = 0.5 * normal(b, H, T).abs()
    made = {
        "Q": normal(b, T, groups, N), "K": normal(b, T, groups, N), "V": normal(b, T, H, P),
        "ADT": -DT * decay * normal(b, H, T).abs(), "DT": DT, "Trap": 2.0 * normal(b, H, T),
        "Q_bias": 1.0 + 0.1 * normal(H, N), "K_bias": 1.0 + 0.1 * normal(H, N),
        "Angles": 2.0 * normal(b, T, H, S),
    }  # fmt: skip
    if "nats" in case:
        made["ADT"] = torch.full_like(DT, -case["nats"])
    if case.get("D"):
        made["D"] = normal(H)
    if case.get("Z"):
        made["Z"] = normal(b, T, H, P)
    if case.get("states"):
        n = len(cu_seqlens) - 1 if cu_seqlens else b
        made["angle"], made["ssm"] = 6.0 * torch.rand(n, H, S, generator=rng), normal(n, H, P, N)
        made["k"], made["v"] = normal(n, H, N), normal(n, H, P)
    for name in ("Q", "K", "V", "Z", "v"):
        if name in made:
            made[name] = made[name].to(dtype)
    if cu_seqlens:
        made["cu_seqlens"] = torch.tensor(cu_seqlens)
    return {name: x.to(device) for name, x in made.items()}


@verifying()
def results(
    made: dict[str, Any], wide: bool = False, op: Any = mamba3_siso_combined
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return mamba3_results(made, op, wide=wide, peer=op is not mamba3_siso_combined)


def errors(name: str, dtype: str = "float32") -> dict[str, float]:
    mine, theirs = results(draw(CASES[name], getattr(torch, dtype)))
    return relative_errors(mine, theirs)


def poisoned_errors(name: str, dtype: str = "float32") -> dict[str, float]:
    with poisoned():
        return errors(name, dtype)


def chunk_errors(name: str, dtype: str = "float32") -> dict[str, float]:
    """By the kernels over chunks, of which sequences have some."""
    force_tile(16)
    try:
        with chunks_forced(True):
            return poisoned_errors(name, dtype)
    finally:
        force_tile(None)


@verifying()
def errors_at_once(name: str, fast: bool) -> tuple[list[tuple[int, bool]], dict[str, float]]:
    """By the kernels over chunks with states and outputs in one stage, which stands token by token
    in fp64 in the place of its kernel: what it was asked to keep of tensors of the shapes that its
    operands have, and errors."""
    kept: list[tuple[int, bool]] = []

    def scan_launch(problem: Mamba3Problem, keep: int, BT: int, *_: Any) -> Any:
        operands = MAMBA3_SCAN.operands(mamba3_scan.scan_problem(problem))

        def launch(*given: Tensor, T: int) -> None:
            x = dict(zip([y.name for y in operands], given, strict=True))
            right, (B, _, H, P) = recurrent_scan(x, BT), x["V"].shape
            shapes = {"h": (B * -(-T // BT), H, P, x["k"].shape[3]), "ungated": (B, T, H, P)}
            made = {"out": right.out, "final_ssm": right.last}
            made |= {"ungated": right.y} if "Z" in x and keep else {}
            made |= {"h": right.h} if keep == 2 else {}
            for y, found in made.items():
                x[y].copy_(found)
            whole = all(x[y].shape == shapes[y] for y in shapes.keys() & made.keys())
            kept.append((keep, whole))

        return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba3_chunks, "scan_launch", scan_launch)
        force_tile(16)
        try:
            with chunks_forced(True), poisoned():
                op = partial(mamba3_siso_combined, disable_recompute=fast)
                found = relative_errors(*mamba3_results(draw(CASES[name]), op))
                with torch.no_grad():
                    mamba3_siso_combined(**arguments(draw(CASES[name])))
        finally:
            force_tile(None)
    return kept, found


@verifying()
def errors_scanned_back(
    name: str, fast: bool, heads: int = 1, order: str = "heads"
) -> tuple[list[bool], dict[str, float]]:
    """By the kernels over chunks with the backward's products in one stage, in the place of whose
    kernel are gradients of its recurrence in fp64; what it leaves is added up by the other stage,
    `heads` of a program, which loops over what `order` says. Whether all that it was given to
    write was of the shapes that it makes, and errors."""
    told: list[bool] = []

    def launches(problem: Mamba3Problem, BT: int, *sizes: Any) -> Any:
        _, _, H, G, *_ = sizes
        own = mamba3_reverse_scan.reverse_scan_problem(problem)
        operands = MAMBA3_REVERSE_SCAN.operands(own)

        def scan(*given: Tensor, T: int) -> None:
            x = dict(zip([y.name for y in operands], given, strict=True))
            outputs = {y.name for y in MAMBA3_REVERSE_SCAN.outputs} & x.keys()
            found = scanned_back({y: z for y, z in x.items() if y not in outputs}, own.angles, BT)
            if "dtheta_part" in x:
                # all of it of one part
                part = found["dtheta_part"][:, :, None]
                found["dtheta_part"] = torch.cat((part, *[torch.zeros_like(part)] * 3), 2)
            told.append(all(x[y].shape == found[y].shape for y in outputs))
            for y in outputs:
                x[y].copy_(found[y])

        by_tokens = {"order": order, "BG": H // G, "num_stages": 3} if order != "heads" else {}
        add = loaded(
            mamba3_reverse_scan.sums_problem(problem),
            MAMBA3_SUMS.name,
            {"BT": BT, "BH": heads, **by_tokens},
            torch.device("cpu"),
        )
        return scan, add

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime_reverse_scan, "launches_at_once", launches)
        force_tile(16)
        try:
            with chunks_forced(True), poisoned():
                op = partial(mamba3_siso_combined, disable_recompute=fast)
                found = relative_errors(*mamba3_results(draw(CASES[name]), op))
        finally:
            force_tile(None)
    return told, found


def sums_in_16_bits(N: int, S: int) -> dict[str, float]:
    """Of `mamba3_sums` in bf16, four heads to a group and a last chunk that is not full: how far
    loops over tokens are off what a loop over heads makes, of the largest number there."""
    problem = Mamba3Problem(state_size=N, head_dim=16, angles=S)
    rng = torch.Generator().manual_seed(0)
    B, T, H, G, BT = 2, 24, 8, 2, 16
    sizes = {"B": B, "T": T, "H": H, "G": G, "N": N, "P": 16, "S": S, "M": 2 * B, "n": B}
    own = mamba3_reverse_scan.sums_problem(problem)
    outputs = [x for x in MAMBA3_SUMS.operands(own) if x in MAMBA3_SUMS.outputs]

    def drawn(x: Operand) -> Tensor:
        shape = [int(y) if y.isdigit() else sizes[y] for y in x.dims.split()]
        if x.dtype_in(own) == "int32":
            return torch.randint(-(2**31), 2**31, shape, generator=rng, dtype=torch.int32)
        return torch.randn(shape, generator=rng).to(
            getattr(torch, DTYPE[x.dtype_in(own)].full_name)
        )

    given = [drawn(x) for x in MAMBA3_SUMS.operands(own) if x not in outputs]
    scalars = {"T": T, "H": H, "G": G, "n_tiles": 2 * B, "angle_row": H * S, "angle_head": S}

    def made(knobs: dict[str, Any]) -> list[Tensor]:
        places = [torch.full_like(drawn(x), float("nan")) for x in outputs]
        add = loaded(own, MAMBA3_SUMS.name, {"BT": BT, "BH": 2, **knobs}, torch.device("cpu"))
        add(*given, *places, **scalars)
        return [x.double() for x in places]

    usual = made({})
    return {
        f"{x.name} {stages}": float((y - z).abs().max() / z.abs().max())
        for stages in (3, 1)
        for x, y, z in zip(
            outputs,
            made({"order": "tokens", "BG": H // G, "num_stages": stages}),
            usual,
            strict=True,
        )
    }


def angle_errors(chosen: bool, tokens: int) -> dict[str, float]:
    """In bf16 after tokens that decay little: by kernels over chunks, or around a scan."""
    case = {"sizes": (1, 16, 32), "angles": 8, "T": tokens, "Z": True, "decay": 0.1, "rows": 1}
    with chunks_forced(chosen), poisoned():
        return relative_errors(*results(draw(case, torch.bfloat16)))


def blocks_of_heads() -> dict[str, float]:
    """Errors where programs take two heads each, of one group, and sums go over many tiles."""
    return _with_knobs([x.name for x in MAMBA3_AROUND], {"BH": 2}, LONG)


def slices_and_blocks() -> dict[str, float]:
    """Of kernels over chunks: programs of two heads each, slices of values, and what is of
    tokens that write in one program."""
    case = {"sizes": (4, 40, 24), "Z": True, "states": True, "T": 40, "rows": 1}
    force_tile(32)
    try:
        with chunks_forced(True):
            knobs = {"BH": 2, "BV": 16, "parts": 2}
            return _with_knobs([x.name for x in MAMBA3_CHUNK_STAGES], knobs, case)
    finally:
        force_tile(None)


def _with_knobs(stages: list[str], knobs: dict[str, Any], case: dict[str, Any]) -> dict[str, float]:
    for name in stages:
        force(name, {x: y for x, y in knobs.items() if x in EVERY_STAGE[name].domains})
    try:
        with poisoned():
            return relative_errors(*results(draw(case)))
    finally:
        for name in stages:
            force(name, None)


@verifying()
def check_packed() -> bool:
    """Packed sequences give what each gives by itself."""
    made = arguments(draw(CASES["packed"]))
    found = mamba3_siso_combined(**made, return_final_states=True)
    ends = made["cu_seqlens"].tolist()
    for n, (start, end) in enumerate(itertools.pairwise(ends)):
        alone = part_of(made, slice(start, end)) | {
            "Input_States": tuple(x[n : n + 1] for x in made["Input_States"]),
            "cu_seqlens": None,
        }
        out, *states = mamba3_siso_combined(**alone, return_final_states=True)
        torch.testing.assert_close(out[0], found[0][0, start:end], rtol=1e-5, atol=1e-5)
        for x, y in zip(states, found[1:], strict=True):
            torch.testing.assert_close(x[0], y[n], rtol=1e-5, atol=1e-5)
    return True


def part_of(made: dict[str, Any], part: slice) -> dict[str, Any]:
    """The arguments of some tokens."""
    tokens = {x: made[x][:, part] for x in ("Q", "K", "V", "Angles", "Z") if x in made}
    return made | tokens | {x: made[x][..., part] for x in ("ADT", "DT", "Trap")}


@verifying()
def check_uncovered(chosen: bool) -> bool:
    """Tokens after the last sequence's, of which on a GPU the host knows nothing: zeros, and the
    gradients of those before them, and of what all share, are as without them."""
    case = {"cu_seqlens": (0, 0, 7, 8, 30), "D": True, "Z": True, "states": True}
    made, longer = draw(case), draw(case | {"cu_seqlens": (0, 0, 7, 8, 30, 40)})
    for name, x in longer.items():
        if name in ("angle", "ssm", "k", "v", "cu_seqlens", "D", "Q_bias", "K_bias"):
            longer[name] = made[name]
        else:
            part = (..., slice(30)) if name in ("ADT", "DT", "Trap") else (slice(None), slice(30))
            x[part] = made[name]
    found = []
    with pytest.MonkeyPatch.context() as patch, chunks_forced(chosen), poisoned():
        for module in (mamba3, arguments_of_ops):
            patch.setattr(module, "check_cu_seqlens", lambda *_: None)
        for given in (made, longer):
            leaves = {x: y.requires_grad_() for x, y in given.items() if y.is_floating_point()}
            out = mamba3_siso_combined(**arguments(given | leaves))
            found.append(
                (
                    out,
                    dict(
                        zip(
                            leaves,
                            torch.autograd.grad(out.square().sum(), leaves.values()),
                            strict=True,
                        )
                    ),
                )
            )
    (out, gradients), (whole, others) = found
    assert torch.equal(whole[:, :30], out) and not whole[:, 30:].any()
    for name, x in others.items():
        y = gradients[name]
        if name in ("ADT", "DT", "Trap"):
            x, rest = x[..., :30], x[..., 30:]
        elif x.shape != y.shape:
            x, rest = x[:, :30], x[:, 30:]
        else:
            rest = x.new_zeros(1)
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
        assert not rest.any(), name
    return True


@verifying()
def check_halves() -> bool:
    """A sequence in two calls, the first one's states in the second."""
    made = arguments(draw(CASES["layer"]))
    whole = mamba3_siso_combined(**made, return_final_states=True)
    first = mamba3_siso_combined(**part_of(made, slice(0, 19)), return_final_states=True)
    rest = part_of(made, slice(19, None)) | {"Input_States": first[1:]}
    second = mamba3_siso_combined(**rest, return_final_states=True)
    found = (torch.cat((first[0], second[0]), 1), *second[1:])
    for x, y in zip(found, whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    return True


@verifying()
def check_causal() -> bool:
    """What all tokens after the 20th hold changes no bit of the output before."""
    made = arguments(draw(CASES["layer"], torch.bfloat16))
    other = arguments(draw(CASES["layer"], torch.bfloat16))
    for name in ("Q", "K", "V", "Angles", "Z"):
        other[name][:, 20:] *= -3.0
    for name in ("ADT", "DT", "Trap"):
        other[name][..., 20:] *= 2.5
    found, changed = (mamba3_siso_combined(**x) for x in (made, other))
    assert torch.equal(found[:, :20], changed[:, :20])
    assert not torch.equal(found[:, 20], changed[:, 20])
    return True


@verifying()
def check_steps(device: str = "cpu", **sizes: Any) -> bool:
    """Token by token is the whole; in fp32, and once in bf16."""
    made = arguments(draw(CASES["layer"] | {"T": 5} | sizes, device=device))
    whole, last = recurrent(**{x: _doubled(y) for x, y in made.items()})
    states, outputs = made.pop("Input_States"), []
    with poisoned():
        for t in range(5):
            out, states = mamba3_siso_step(**token_of(made, t), Input_States=states)
            outputs.append(out)
    found = (torch.stack(outputs, 1), *states)
    for x, y in zip(pointing(found), pointing((whole, *last)), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
    narrow = {x: y.bfloat16() if x in "QKVZ" else y for x, y in token_of(made, 0).items()}
    out, states = mamba3_siso_step(**narrow, Input_States=states)
    assert out.dtype == states[3].dtype == torch.bfloat16 and states[1].dtype == torch.float32
    assert bool(torch.isfinite(out).all())
    return True


def check_steps_of_groups() -> bool:
    return check_steps(groups=2, angles=0)


def token_of(made: dict[str, Any], t: int) -> dict[str, Any]:
    """The step's arguments of one token."""
    rows = {x: made[x][:, t] for x in ("Q", "K", "V", "Angles", "Z")}
    return made | rows | {x: made[x][..., t] for x in ("ADT", "DT", "Trap")}


def _doubled(x: Any) -> Any:
    return tuple(y.double() for y in x) if isinstance(x, tuple) else x.double()


@verifying()
def check_compiled(device: str = "cpu", backend: str = "aot_eager") -> bool:
    """torch.compile takes the op whole, and gives the same bits."""
    made = arguments(draw(CASES["packed"], device=device))
    leaves = [made[x].requires_grad_() for x in ("Q", "DT", "Angles", "Z", "K_bias")]

    def run(**given: Any) -> Any:
        return mamba3_siso_combined(**given, return_final_states=True)

    found, wanted = torch.compile(run, backend=backend, fullgraph=True)(**made), run(**made)
    assert all(map(torch.equal, found, wanted))
    ours, theirs = (torch.autograd.grad(x[0].sum() + x[2].sum(), leaves) for x in (found, wanted))
    assert all(map(torch.equal, ours, theirs))
    return True


def check_compiled_over_chunks() -> bool:
    with chunks_forced(True):
        return check_compiled()


def check_ops() -> bool:
    """What torch wants of ops in its library."""
    x = draw(CASES["packed"])
    tiles = kernels.tables(x["cu_seqlens"], 40, 16)
    numbers, biases = [x["ADT"], x["DT"], x["Trap"]], [x["Q_bias"], x["K_bias"]]
    for y in (x["Q"], *numbers, *biases, x["Angles"], x["V"], x["Z"]):
        y.requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    given = (x["Q"], x["K"], numbers, biases, x["Angles"], None, x["angle"], tiles, 16)
    torch.library.opcheck(mamba3_ops.PROLOGUE, given, test_utils=checks)
    own = torch.randn(1, 40, 2)
    after = (x["V"].detach() * 2, x["V"], own, x["Z"], x["v"], tiles, 16)
    torch.library.opcheck(mamba3_ops.EPILOGUE, after, test_utils=checks)
    states = x["angle"], x["ssm"]
    whole = (x["Q"], x["K"], x["V"], numbers, biases, x["Angles"], None, x["Z"], *states)
    torch.library.opcheck(mamba3_chunk_ops.CHUNKED, (*whole, tiles, 16, 1), test_utils=checks)
    return True


def refusals() -> tuple[str, str]:
    """What kernels that nothing has verified say."""
    found = []
    made = arguments(draw(CASES["layer"]))
    for call, given in (
        (mamba3_siso_combined, made),
        (mamba3_siso_step, token_of(made, 0)),
    ):
        try:
            call(**given)
        except UnsupportedError as error:
            found.append(str(error))
    combined, step = found
    return combined, step


def timed_and_checked() -> tuple[list[str], dict[str, float], str, str]:
    """What the tuner has a worker do, with a clock that stands still: which stages ran, the errors
    of a whole op with knobs that are forced, and what is said of it and of a step."""
    problem = Mamba3Problem(
        dtype="fp32", state_size=24, head_dim=16, angles=6, skip=True, gate=True
    )
    shape, ran = Shape("small", 1, 33, 2, groups=1), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba3_times, "DEVICE", "cpu")
        patch.setattr(mamba3_times, "_CHECKED", ("mixed",))

        def time_ms(run: Any) -> Timing:
            run()
            return Timing(1.0, 1.0, 1.0, 5)

        patch.setattr(mamba3_times, "time_ms", time_ms)
        around = {x.name: {"BT": 32, "BH": 2, "num_warps": 1} for x in MAMBA3_AROUND}
        chunks = {
            x.name: {"BT": 32, "BH": 2, "BV": 16, "num_warps": 1} for x in MAMBA3_CHUNK_STAGES
        }
        chunks = {
            x: {z: w for z, w in y.items() if z in EVERY_STAGE[x].domains}
            for x, y in chunks.items()
        }
        for stage, knobs in (around | chunks).items():
            forced = {x: y for x, y in knobs.items() if x != "BT"}
            assert mamba3_times.time_knobs(problem, shape, stage, 32, forced) == 1.0
            ran.append(stage)
        errors, wrong = mamba3_times.check_knobs(problem, shape, 32, around)
        with chunks_forced(True):
            more, wrong_chunks = mamba3_times.check_knobs(problem, shape, 32, chunks)
        errors = {x: max(y, more[x]) for x, y in errors.items()}
        wrong += wrong_chunks
        carried = replace(problem, carried=True)
        step = {MAMBA3_STEP.name: {"BT": 1, "BR": 16, "num_warps": 1}}
        one = replace(shape, T=1)
        mamba3_times.time_knobs(carried, one, MAMBA3_STEP.name, 1, {"BR": 16, "num_warps": 1})
        _, wrong_step = mamba3_times.check_knobs(carried, one, None, step)
    return ran, errors, wrong, wrong_step


def tuned_and_not(path: str) -> dict[str, float]:
    """Largest differences between what runs by a rule, and by entries on file in a folder: of
    another tile, and of two heads a program. All outputs and gradients."""
    case = {"T": 20, "D": True, "Z": True}
    made = draw(case)
    by_rule = results(made)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GDN2GEN_TUNED_DIR", path)
        reload()
        asked = Mamba3Problem(dtype="fp32", state_size=24, head_dim=16, angles=6)
        device = torch.device("cpu")
        assert tile_at(asked, 40, 2, 1, device) == 32
        with batch_invariant():
            assert tile_at(asked, 40, 2, 1, device) == 16  # that of all batches, which has no entry
        by_entry = results(made)[0]
    reload()
    return relative_errors(by_entry, by_rule)


def fast_errors() -> tuple[list[bool], dict[str, float]]:
    """What the scan is told of a call at level fast, and its errors."""
    told: list[bool] = []
    scan = mamba3.chunk_simple_gla

    def seen(*given: Any, **options: Any) -> Any:
        told.append(options["disable_recompute"])
        return scan(*given, **options)

    with pytest.MonkeyPatch.context() as patch, poisoned():
        patch.setattr(mamba3, "chunk_simple_gla", seen)
        made = draw(CASES["packed"])
        fast = results(made, op=partial(mamba3_siso_combined, disable_recompute=True))
    return told, relative_errors(*fast)


@verifying()
def fakes_are_like_what_is_made() -> bool:
    """What a tracer is told of results in 16 bits has their shapes and dtypes, kept or not."""
    ops: Any = mamba3_chunk_ops

    def looks(found: Any) -> list[Any]:
        flat = itertools.chain.from_iterable(x if isinstance(x, list) else [x] for x in found)
        return [(tuple(x.shape), x.dtype) for x in flat]

    for case, keep in itertools.product(({}, CASES["packed"]), (0, 1, 2)):
        x = draw(case, torch.float16)
        tiles = [] if not case else kernels.tables(x["cu_seqlens"], 40, 16)
        given = (
            *(x[y] for y in "QKV"), [x[y] for y in ("ADT", "DT", "Trap")],
            [x["Q_bias"], x["K_bias"]], x["Angles"], None, x.get("Z"), x.get("angle"),
            x.get("ssm"), tiles, 16,
        )  # fmt: skip
        made = ops._chunked(*given, keep)
        assert looks(made) == looks(ops._chunked_fake(*given, keep)), (case, keep)
        if keep:
            back = ([torch.ones_like(made[0]), made[1], made[2]], [made[1], *made[3:]], *given)
            found, faked = ops._chunked_backward(*back), ops._chunked_backward_fake(*back)
            assert looks(found) == looks(faked), (case, keep)
    return True
