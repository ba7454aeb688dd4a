"""The stage `forward`, prepare and scan in one kernel: arithmetic, barriers, what it takes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Final

import pytest
import torch
from cluster_standin import run_all

from gdn2gen.base.device import named_device
from gdn2gen.codegen.build import compile_ahead, load
from gdn2gen.codegen.render import render
from gdn2gen.family import reference
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import recurrence_named
from gdn2gen.kernels.config import default_config
from gdn2gen.measure.accuracy import relative_errors

SEGMENT: Final = 2
SCALE: Final = 128**-0.5


def module_of(problem: Problem) -> ModuleType:
    return load(render(problem, "forward", default_config("forward", problem)))


def carried_out(
    op: str, T: int, pattern: str, *, shared: int = 1, v_first: bool = False
) -> dict[str, float]:
    """Errors of o and the state, of those that are kept, and of rows of zeros past the end."""
    problem = Problem(op, initial_state=True, final_state=True, state_v_first=v_first)
    x = make_inputs(
        1, T, 1, 128, 128, op=op, dtype=torch.bfloat16, pattern=pattern, initial_state=True,
        HV=shared,
    )  # fmt: skip
    found, written = results(problem, x)
    assert all(found[name].isfinite().all() for name in written)
    if v_first:
        found["final_state"] = found["final_state"].transpose(-1, -2)
    return relative_errors(found, expected(op, x, T))


def results(
    problem: Problem, x: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """All tensors after the kernel, and the names of those that it writes."""
    op, v_first = problem.op, problem.state_v_first
    _, T, shared, _ = x["v"].shape
    chunks = -(-T // 32)
    segments = -(-chunks // SEGMENT)
    state_dims = (1, shared, 128, 128)
    half = {"dtype": torch.bfloat16}
    written = {
        "o": torch.full((1, T, shared, 128), torch.nan, **half),
        "final_state": torch.full(state_dims, torch.nan),
        "q_rstd": torch.full((chunks, shared, 32), torch.nan),
        "k_rstd": torch.full((chunks, shared, 32), torch.nan),
        "A": torch.full((chunks, shared, 32, 32), torch.nan, **half),
        "Aqk": torch.full((chunks, shared, 32, 32), torch.nan, **half),
        "S_seg": torch.full((1, shared, segments, 128, 128), torch.nan),
    }
    if op == "kda":
        written["k_beta"] = torch.full((chunks, shared, 32), torch.nan)
    given = dict(x)
    if v_first:
        given["initial_state"] = x["initial_state"].transpose(-1, -2).contiguous()
    HG = x["g"].shape[2]
    sizes = {"B": 1, "T": T, "H": 1, "HV": shared, "HG": HG, "NT": chunks, "NS": segments}
    found = run_all(module_of(problem), given | written, sizes, SCALE, SEGMENT)
    return found, tuple(written)


def expected(op: str, x: dict[str, torch.Tensor], T: int) -> dict[str, torch.Tensor]:
    exact = {name: value.double() for name, value in x.items()}

    def until(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        given = {n: v if n == "initial_state" else v[:, :tokens] for n, v in exact.items()}
        return reference.recurrent(
            recurrence_named(op),
            given,
            use_qk_l2norm_in_kernel=True,
            compute_dtype=torch.float64,
        )

    o, state = until(T)
    starts = [until(i)[1] for i in range(0, T, 32 * SEGMENT)]
    shared = o.shape[2]
    found = {
        "o": o,
        "final_state": state,
        "S_seg": torch.stack(starts, 2).transpose(-1, -2),
        "k_rstd": _rstd(exact["k"], shared),
        "q_rstd": _rstd(exact["q"], shared),
    }
    if op == "kda":
        padded = torch.nn.functional.pad(exact["beta"][0], (0, 0, 0, -T % 32))
        found["k_beta"] = padded.reshape(-1, 32, shared).transpose(1, 2)
    return found


def _rstd(x: torch.Tensor, shared: int) -> torch.Tensor:
    """Of one head, for all that share it, by chunk; a token past the end is zero."""
    T = x.shape[1]
    padded = torch.nn.functional.pad(x[0, :, 0], (0, 0, 0, -T % 32))
    found = torch.rsqrt(padded.square().sum(-1) + 1e-6).reshape(-1, 1, 32)
    return found.expand(-1, shared, -1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # factors out of the first frame
@pytest.mark.parametrize(
    ("op", "T", "pattern", "shared", "v_first"),
    [
        ("gdn2", 7, "layer", 1, False),
        pytest.param("gdn2", 140, "mixed", 1, False, marks=pytest.mark.slow),
        pytest.param("gdn2", 33, "layer", 2, True, marks=pytest.mark.slow),
        pytest.param("kda", 40, "strong", 1, False, marks=pytest.mark.slow),
    ],
)
def test_results_and_barriers(op: str, T: int, pattern: str, shared: int, v_first: bool) -> None:
    """Five chunks take each slot once, and one twice; every wait ends, and none too early."""
    errors = carried_out(op, T, pattern, shared=shared, v_first=v_first)
    assert max(errors.values()) < 1e-2, errors


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_later_tokens_decay_moves_no_bit_of_earlier_outputs() -> None:
    """It takes the chunk into later frames, where the decay is summed once more."""
    problem = Problem(initial_state=True, final_state=True)
    x = make_inputs(
        1, 32, 1, 128, 128, op="gdn2", dtype=torch.bfloat16, pattern="layer", initial_state=True
    )
    changed = x | {"g": x["g"].clone()}
    changed["g"][:, 20:, :, ::3] = -12.0
    (usual, _), (strong, _) = results(problem, x), results(problem, changed)
    assert torch.equal(usual["o"][:, :20], strong["o"][:, :20])
    assert not torch.equal(usual["o"][:, 20:], strong["o"][:, 20:])
    assert relative_errors(strong, expected("gdn2", changed, 32))["o"] < 4e-3


@pytest.mark.slow
@pytest.mark.tilelang
@pytest.mark.parametrize(
    ("problem", "shared"),
    [
        (Problem(), 231_424),
        (Problem(initial_state=True, final_state=True), 231_424),
        (Problem("kda", beta_sigmoid=True, neg_eigval=True), 207_872),
    ],
    ids=("gdn2", "states", "kda"),
)
def test_it_compiles_for_a_whole_multiprocessor(
    problem: Problem, shared: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hardly a register is spilled, and a program fits into 227 KB."""
    # what is kept passes no compiler
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    config = default_config("forward", problem)
    used = compile_ahead(problem, "forward", config, named_device("H200"))
    assert (used.registers, used.threads) == (168, 384)
    assert used.spill_bytes <= 32
    assert shared <= used.shared_bytes <= 227 * 1024
