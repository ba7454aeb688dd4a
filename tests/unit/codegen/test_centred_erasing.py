"""The TileLang form `centred` of members that erase, carried out in Python, beside fp64."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

import pytest
import tilelang_standin
import tilelang_threads
import torch
from source_tree import ROOT, SUPPORT, python_path
from tilelang_configs import tilelang_by_chunk
from torch import Tensor

from gdn2gen.codegen.build import load
from gdn2gen.codegen.render import render
from gdn2gen.family.problem import Problem

BT, K, V = 32, 64, 32
SCALE: Final = K**-0.5
SIZES: Final = {"B": 1, "T": BT, "H": 1, "HV": 1, "HG": 1, "NT": 1, "NK": 1}
WITHIN: Final = 2.6
"""Bits a token that one anchor reaches: less than 120 a chunk, and more than 96."""


def chunk(loss: float, of: str = "all") -> dict[str, Tensor]:
    """A chunk whose decay is `loss` bits on average, or that of every third channel alone."""
    rng = torch.Generator().manual_seed(7)
    x = {name: torch.randn(1, BT, 1, K, generator=rng) / 8 for name in ("q", "k")}
    x |= {"b": torch.rand(1, BT, 1, K, generator=rng)}
    x |= {"do": torch.randn(1, BT, 1, V, generator=rng)}
    x |= {name: torch.randn(1, 1, V, K, generator=rng) for name in ("h", "dh")}
    x |= {name: torch.randn(1, 1, BT, V, generator=rng) for name in ("R", "dX")}
    x |= {name: torch.randn(1, 1, BT, BT, generator=rng).tril(-1) for name in ("dT", "dAqk")}
    x = {name: y.bfloat16() for name, y in x.items()}
    lost = torch.rand(1, BT, 1, K, generator=rng) * 2 * loss
    if of == "channels":
        lost = torch.where(torch.arange(K) % 3 == 0, lost, 0.01)
    more = {"dAqk_diagonal": torch.randn(1, 1, BT, generator=rng)}
    more |= {"beta": torch.rand(1, BT, 1, generator=rng)}
    return x | more | {"g": -lost * torch.tensor(2.0).log(), "lost": lost}


def test_losses_are_on_both_sides_of_what_one_anchor_reaches() -> None:
    most = {loss: chunk(loss)["lost"].sum(1).max() for loss in (WITHIN, 3.7)}
    assert 96 < most[WITHIN] < 120 < most[3.7]


def program(op: str, stage: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the stage's program writes."""
    problem = Problem(op, K=K, V=V, l2norm=False)
    config = tilelang_by_chunk(stage, problem).replace(decay="centred")
    module = load(render(problem, stage, config))
    chunks, rows = (1, 1, BT), (1, BT, 1, K)
    shapes = {"Aqk": (*chunks, BT), "A": (*chunks, BT)}
    shapes |= dict.fromkeys(("Qg", "Ktail", "Y"), (*chunks, K))
    shapes |= dict.fromkeys(("dq", "dk", "db"), rows)
    nothing = {name: torch.full(size, torch.nan).bfloat16() for name, size in shapes.items()}
    nothing |= {"dg": torch.full(rows, torch.nan)}
    nothing |= {"dbeta_part": torch.full((*chunks[:2], 1, BT), torch.nan)}
    G = -x["lost"].double().clamp(max=150).cumsum(1)
    given = {**nothing, "gamma_C": G[:, -1].exp2().float(), "G": G.float(), **x}
    # what is made of beta, and what only kernels of beta read
    given |= {
        "k_beta": x["beta"].transpose(1, 2),
        "beta_dot": x["dAqk_diagonal"],
        "dbeta": x["beta"],
    }
    runner = tilelang_threads if stage == "prepare" else tilelang_standin
    written: dict[str, Tensor] = runner.run_all(module, given, SIZES, SCALE, 0.0)
    return written


def keys(op: str, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Queries, keys, those that erase and those that are written, in fp64."""
    q, k, b = (x[name].double()[0, :, 0] for name in ("q", "k", "b"))
    return (q, k, k, k * x["beta"].double()[0]) if op == "kda" else (q, k, b * k, k)


def decays(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Between tokens j <= i, [BT, BT, K] in fp64, 0 above; from the chunk's start; to its end."""
    G = -x["lost"].double().clamp(max=150).cumsum(1)[0, :, 0]
    lower = torch.ones(BT, BT).tril().bool()[..., None]
    between = torch.where(lower, G[:, None] - G[None, :], -torch.inf).exp2()
    return between, G.exp2(), between[-1]


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


_LOSSES: Final = [
    pytest.param(0.5, "all", marks=pytest.mark.slow),
    pytest.param(WITHIN, "all", marks=pytest.mark.slow),
    pytest.param(3.7, "all", marks=pytest.mark.slow),
    pytest.param(140.0, "all", marks=pytest.mark.slow),
    (29.0, "channels"),
]
_QUIET: Final = pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")


@_QUIET
@pytest.mark.parametrize(("loss", "of"), _LOSSES)
@pytest.mark.parametrize("op", ["gdn2", pytest.param("kda", marks=pytest.mark.slow)])
def test_gradients_at_any_decay(op: str, loss: float, of: str) -> None:
    x = chunk(loss, of)
    written = program(op, "grad_key", x)
    found = {name: written[name][0, :, 0] for name in ("dq", "dk", "db", "dg") if name in written}
    q, k, e, c = keys(op, x)
    do, dX, R = x["do"].double()[0, :, 0], x["dX"].double()[0, 0], x["R"].double()[0, 0]
    h, dh = x["h"].double()[0, 0], x["dh"].double()[0, 0]
    dT, dAqk = x["dT"].double()[0, 0], x["dAqk"].double()[0, 0]
    own = SCALE * x["dAqk_diagonal"].double()[0, 0, :, None]
    between, head, tail = decays(x)
    dq = SCALE * (head * (do @ h) + torch.einsum("ij,jk,ijk->ik", dAqk, c, between)) + own * c
    de = -head * (dX @ h) + torch.einsum("ij,jk,ijk->ik", dT, c, between)
    met = SCALE * dAqk[..., None] * q[:, None] + dT[..., None] * e[:, None]
    dc = tail * (R @ dh) + (met * between).sum(0) + own * q
    if op == "kda":
        assert off(found["dk"], de + dc * x["beta"].double()[0]) < 4e-3
        assert off(written["dbeta_part"][0, 0, 0], (dc * k).sum(1)) < 4e-3
    else:
        assert off(found["dk"], dc + de * x["b"].double()[0, :, 0]) < 4e-3
        assert off(found["db"], de * k) < 4e-3
    assert off(found["dq"], dq) < 4e-3
    # of every token's decay: what it lies between
    pairs = met * c * between
    before = head * (SCALE * q * (do @ h) - e * (dX @ h))
    after = tail * (R @ dh) * c
    through = head[-1] * (h * dh).sum(0)
    dg = torch.stack(
        [pairs[t:, :t].sum((0, 1)) + before[t:].sum(0) + after[:t].sum(0) for t in range(BT)]
    )
    assert off(found["dg"], dg + through) < 8e-3


@_QUIET
@pytest.mark.parametrize(("loss", "of"), _LOSSES)
@pytest.mark.parametrize("op", [pytest.param("gdn2", marks=pytest.mark.slow), "kda"])
def test_scores_inverse_and_factors_at_any_decay(op: str, loss: float, of: str) -> None:
    x = chunk(loss, of)
    found = {name: y[0, 0].double() for name, y in program(op, "prepare", x).items()}
    q, _, e, c = keys(op, x)
    between, head, tail = decays(x)
    T = torch.einsum("ik,jk,ijk->ij", e, c, between).tril(-1)
    A = torch.linalg.inv(torch.eye(BT) + T)
    assert off(found["Aqk"], SCALE * torch.einsum("ik,jk,ijk->ij", q, c, between)) < 4e-3
    assert off(found["A"], A) < 4e-3
    assert off(found["Y"], -A @ (head * e)) < 5e-3
    assert off(found["Qg"], SCALE * head * q) < 4e-3
    assert off(found["Ktail"], tail * c) < 4e-3


@_QUIET
@pytest.mark.slow
@pytest.mark.parametrize("op", ["gdn2", "kda"])
def test_rows_do_not_see_what_later_tokens_decay_by(op: str) -> None:
    """Bit for bit, where the later tokens leave the reach of the chunk's one anchor."""
    x = chunk(1.0)
    later = x["lost"].clone()
    later[:, 20:] += 40.0
    other = x | {"lost": later, "g": -later * torch.tensor(2.0).log()}
    found, moved = (program(op, "prepare", y) for y in (x, other))
    for name in ("A", "Aqk", "Y", "Qg"):
        assert torch.equal(found[name][0, 0, :20], moved[name][0, 0, :20])
        assert not torch.equal(found[name][0, 0, 20:], moved[name][0, 0, 20:])


@_QUIET
@pytest.mark.slow
@pytest.mark.parametrize("width", [32, 128])
def test_levels_of_parts_of_other_lengths(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread's part is 4 of the tokens, or 16: three levels are of several parts, or one."""
    monkeypatch.setitem(globals(), "K", width)
    monkeypatch.setitem(globals(), "SCALE", width**-0.5)
    test_scores_inverse_and_factors_at_any_decay("gdn2", 29.0, "channels")
    test_scores_inverse_and_factors_at_any_decay("kda", 3.7, "all")
    test_rows_do_not_see_what_later_tokens_decay_by("gdn2")


_MORE: Final = {"sparse": ("packed",), "uniform": ("packed", "softplus")}


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["strong", "uniform", "sparse", "zero", "mixed", "mqar"])
@pytest.mark.parametrize("op", ["gdn2", "kda"])
@pytest.mark.parametrize("stage", ["prepare", "grad_key"])
def test_within_the_op(stage: str, op: str, pattern: str) -> None:
    more = _MORE.get(pattern, ())
    pattern = str(ROOT / "docs/learning/gates/mqar-gdn2.json") if pattern == "mqar" else pattern
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": python_path()}
    command = [sys.executable, "-W", "ignore", str(SUPPORT / "centred_checks.py")]
    command += [stage, op, "64", "40", pattern, *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
