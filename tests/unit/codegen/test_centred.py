"""gla's TileLang form `centred`, carried out in Python, beside its equations in fp64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Final

import pytest
import tilelang_standin
import tilelang_threads
import torch
from source_tree import SUPPORT, python_path
from tilelang_configs import tilelang_by_chunk
from torch import Tensor

from gdn2gen.codegen.build import load
from gdn2gen.codegen.render import render
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.anchors import CENTRED_RANGE

BT, K, V = 32, 64, 32
SCALE: Final = K**-0.5
SIZES: Final = {"B": 1, "T": BT, "H": 1, "HV": 1, "HG": 1, "NT": 1}
LOG2: Final = math.log(2.0)
WITHIN: Final = 2.6


def chunk(loss: float, of: str = "all") -> dict[str, Tensor]:
    """A chunk whose decay is `loss` on average, or of every third channel, or of one token in 8."""
    rng = torch.Generator().manual_seed(7)
    x = {name: torch.randn(1, BT, 1, K, generator=rng) for name in ("q", "k")}
    x |= {name: torch.randn(1, BT, 1, V, generator=rng) for name in ("v", "do")}
    x |= {name: torch.randn(1, 1, V, K, generator=rng) for name in ("h", "dh")}
    x = {name: y.bfloat16() for name, y in x.items()}
    lost = torch.rand(1, BT, 1, K, generator=rng) * 2 * loss
    if of == "channels":
        lost = torch.where(torch.arange(K) % 3 == 0, lost, 0.01)
    if of == "tokens":
        lost = torch.where(torch.arange(BT)[:, None, None] % 8 == 3, lost, 0.01)
    return x | {"g": -lost * LOG2}


def test_losses_are_on_both_sides_of_what_one_anchor_reaches() -> None:
    most = {loss: -chunk(loss)["g"].sum(1).min() / LOG2 for loss in (WITHIN, 3.7)}
    assert 96 < most[WITHIN] < CENTRED_RANGE < most[3.7]


def program(stage: str, x: dict[str, Tensor], scale: float = SCALE) -> dict[str, Tensor]:
    """What the stage's program writes."""
    problem = Problem("gla", K=K, V=V)
    config = tilelang_by_chunk(stage, problem).replace(decay="centred")
    module = load(render(problem, stage, config))
    chunks, rows = (1, 1, BT), (1, BT, 1, K)
    shapes = {"Aqk": (*chunks, BT), "Qg": (*chunks, K), "Ktail": (*chunks, K)}
    shapes |= dict.fromkeys(("dq", "dk", "dg"), rows)
    nothing = {name: torch.full(size, torch.nan).bfloat16() for name, size in shapes.items()}
    G = (x["g"].double() / LOG2).clamp(min=-150).cumsum(1)
    given = {**nothing, "dg": nothing["dg"].float()}
    given |= {"gamma_C": G[:, -1].exp2().float(), "G": G.float(), **x}
    runner = tilelang_threads if stage == "prepare" else tilelang_standin
    return runner.run_all(module, given, SIZES, scale, 0.0)


def decays(x: dict[str, Tensor]) -> Tensor:
    """Between tokens j <= i, [BT, BT, K] in fp64; 0 above."""
    G = (x["g"].double() / LOG2).clamp(min=-150).cumsum(1)[0, :, 0]
    lower = torch.ones(BT, BT).tril().bool()[..., None]
    return torch.where(lower, G[:, None] - G[None, :], -torch.inf).exp2()


def off(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    ("loss", "of"),
    [
        # within the reach of one anchor, which ends at 120 bits a chunk
        pytest.param(0.5, "all", marks=pytest.mark.slow),
        (WITHIN, "all"),
        # past it: in a chunk, in 4 tokens, in one
        pytest.param(3.7, "all", marks=pytest.mark.slow),
        (29.0, "all"),
        pytest.param(140.0, "all", marks=pytest.mark.slow),
        (40.0, "channels"),
    ],
)
def test_gradients_of_keys_and_queries_at_any_decay(loss: float, of: str) -> None:
    x = chunk(loss, of)
    found = program("grad_key", x)
    q, k, do, v = (x[name].double()[0, :, 0] for name in ("q", "k", "do", "v"))
    h, dh = x["h"].double()[0, 0], x["dh"].double()[0, 0]
    between, pairs = decays(x), (do @ v.T).tril()
    head, tail = between[:, 0] * (x["g"][0, 0, 0] / LOG2).double().exp2(), between[-1]
    dq = SCALE * (head * (do @ h) + torch.einsum("ij,jk,ijk->ik", pairs, k, between))
    dk = tail * (v @ dh) + SCALE * torch.einsum("ij,ik,ijk->jk", pairs, q, between)
    # of every token's decay: what it lies between
    met = torch.einsum("ij,ik,jk,ijk->ijk", pairs, q, k, between) * SCALE
    own = SCALE * q * head * (do @ h)  # from before the chunk to i
    left = tail * (v @ dh) * k  # from j to its end
    through = head[-1] * (h * dh).sum(0)
    dg = torch.stack(
        [met[t:, :t].sum((0, 1)) + own[t:].sum(0) + left[:t].sum(0) + through for t in range(BT)]
    )
    assert off(found["dq"][0, :, 0], dq) < 4e-3
    assert off(found["dk"][0, :, 0], dk) < 4e-3
    assert off(found["dg"][0, :, 0], dg) < 8e-3


@pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")
@pytest.mark.parametrize(("loss", "of"), [(WITHIN, "all"), (140.0, "tokens")])
def test_scores_and_factors_at_any_decay(loss: float, of: str) -> None:
    x = chunk(loss, of)
    found = program("prepare", x)
    q, k = (x[name].double()[0, :, 0] for name in ("q", "k"))
    between = decays(x)
    head = between[:, 0] * (x["g"][0, 0, 0] / LOG2).double().exp2()
    assert off(found["Aqk"], SCALE * torch.einsum("ik,jk,ijk->ij", q, k, between)) < 4e-3
    assert off(found["Qg"], SCALE * head * q) < 4e-3
    assert off(found["Ktail"], between[-1] * k) < 4e-3


@pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")
def test_rows_do_not_see_what_later_tokens_decay_by() -> None:
    """Bit for bit, where the later tokens leave the reach of the chunk's one anchor."""
    x = chunk(1.0)
    later = x["g"].clone()
    later[:, 20:] -= 30.0
    found, other = (program("prepare", x | {"g": g}) for g in (x["g"], later))
    for name in ("Aqk", "Qg"):
        assert torch.equal(found[name][0, 0, :20], other[name][0, 0, :20])
    assert not torch.equal(found["Aqk"][0, 0, 20:], other["Aqk"][0, 0, 20:])


@pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")
@pytest.mark.parametrize("power", [pytest.param(-60, marks=pytest.mark.slow), 60])
def test_keys_of_any_norm(power: int) -> None:
    """In reach of one anchor, that of which factors lie furthest apart."""
    x = chunk(WITHIN)
    x |= {"h": x["h"] * 0, "dh": x["dh"] * 0}
    wanted, found = program("grad_key", x), program("grad_key", x | {"k": x["k"] * 2.0**power})
    for name, times in (("dq", power), ("dk", 0), ("dg", power)):
        assert off(found[name], wanted[name].double() * 2.0**times) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["strong", "sparse", "uniform", "mixed"])
@pytest.mark.parametrize("packed", [(), ("packed",)], ids=["", "packed"])
@pytest.mark.parametrize("stage", ["prepare", "grad_key"])
def test_within_the_op(stage: str, packed: tuple[str, ...], pattern: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": python_path()}
    command = [sys.executable, "-W", "ignore", str(SUPPORT / "centred_checks.py")]
    command += [stage, "gla", "64", "40", pattern, *packed]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
