"""What users of this family reported broken elsewhere: gradients, gates, state, bad gates.

Repetition (case 2), causality (case 5) and K != V (case 8) are in test_bits_gpu and
test_accuracy_gpu, the two cases of sheer size (6, 7) in test_sizes_gpu.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_support import (
    DEFAULTS,
    DEVICE,
    PROBLEMS,
    Tensors,
    at_levels,
    draw,
    levels_of,
    moved,
    off,
    recipe_of,
    run,
    sized,
    tokens_of,
)

from gdn2gen.base.errors import InputError
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.registry import OPS
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.accuracy import public_op, relative_errors, run_reference
from gdn2gen.runtime.passes import Pass, poisoned
from gdn2gen.store.dispatch import forced_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

LARGE = sized(2, 4096, 8)
FLAT = sized(1, 4096, 64)
# The reference sees these heads of FLAT: all 64 would take 30 GB.
SOME_HEADS = slice(29, 32)
STEEP = sized(1, 1003, 4)
PIECES, PIECE = 4, 8192


@pytest.mark.parametrize(("name", "count"), [("bf16", 9), ("kda", 8)])
def test_case_1_every_gradient_of_every_recipe(name: str, count: int) -> None:
    """Tuned and default configs, both levels, at a size that fills the GPU."""
    problem = PROBLEMS[name]
    inputs, grads = draw(problem, LARGE, "layer")
    exact = run_reference(problem, inputs, grads)
    for level in dict.fromkeys((*levels_of(name), *DEFAULTS)):
        with poisoned():
            results = run(recipe_of(name, level), inputs, grads)
        assert len(results) == count
        assert not off(results, exact, problem, "layer"), level


@pytest.mark.parametrize(
    ("name", "level"), [*at_levels("bf16"), ("kda", "lean"), ("kda", "tilelang states")]
)
def test_case_3_nothing_is_ever_forgotten(name: str, level: str) -> None:
    """g = 0: dg is right, as much so in the last quarter of the tokens as in the first."""
    recipe = recipe_of(name, level)
    problem = recipe.problem
    inputs, grads = draw(problem, FLAT, "zero")
    assert not inputs["g"].any()
    results = run(recipe, inputs, grads)
    assert not moved(results, run(recipe, inputs, grads))
    results = heads_of(results, SOME_HEADS)
    exact = run_reference(problem, heads_of(inputs, SOME_HEADS), heads_of(grads, SOME_HEADS))
    assert not off(results, exact, problem, "zero")
    quarter = FLAT.T // 4
    for start in range(0, FLAT.T, quarter):
        part, right = (tokens_of(x, start, start + quarter) for x in (results, exact))
        # the bound is for a whole tensor; the last quarter's dg is its smallest
        assert not off({"dg": part["dg"]}, {"dg": right["dg"]}, problem, slack=2.0), start


def heads_of(tensors: Tensors, heads: slice) -> Tensors:
    """Some of the heads: dim 1 of states, dim 2 of the others."""
    return {
        name: (x[:, heads] if "state" in name else x[:, :, heads]).contiguous()
        for name, x in tensors.items()
    }


@pytest.mark.parametrize("decay", [-5.9, -6.0, -20.0])
@pytest.mark.parametrize("name", ["bf16", "kda"])
def test_case_4_strong_decay(name: str, decay: float) -> None:
    """At -20 dg is some 1e-9 and still has its bits; U(-20, 0) and resets are patterns."""
    problem = PROBLEMS[name]
    inputs, grads = draw(problem, STEEP, "constant")
    inputs["g"] = torch.full_like(inputs["g"], decay)
    exact = run_reference(problem, inputs, grads)
    assert exact["dg"].norm() > 0
    for level in levels_of(name):
        with poisoned():
            results = run(recipe_of(name, level), inputs, grads)
        assert not off(results, exact, problem, "constant"), level


@pytest.mark.parametrize(("name", "level"), [*at_levels("bf16"), ("kda", "lean")])
def test_case_9_at_once_or_in_pieces(name: str, level: str) -> None:
    """The state is carried in fp32, within a call and between calls: the same bits either way.

    The lean backward makes the factors again, in another kernel than the forward's. Its states
    within a call follow from those, while a piece starts from the forward's: the last bits of what
    depends on the states may differ (and nothing more: a flipped bit in 1 of 256 is 4e-3 / 16).
    """
    recipe = recipe_of(name, level)
    inputs, grads = draw(recipe.problem, sized(1, PIECES * PIECE, 4), "layer")
    at_once = run(recipe, inputs, grads)
    in_pieces = run_in_pieces(recipe, inputs, grads)
    if level == "lean":
        assert not moved({"o": at_once["o"]}, {"o": in_pieces["o"]})
        errors = relative_errors(in_pieces, at_once)
        assert max(errors.values()) < 1e-3, errors
    else:
        assert not moved(at_once, in_pieces)


def run_in_pieces(recipe: Recipe, inputs: Tensors, grads: Tensors) -> Tensors:
    """`run`, as one graph of calls of PIECE tokens that hand the state on."""
    leaves: dict[str, Any] = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    state, outputs = leaves["initial_state"], []
    with forced_recipe(recipe):
        for start in range(0, PIECES * PIECE, PIECE):
            piece: dict[str, Any] = tokens_of(leaves, start, start + PIECE)
            o, state = public_op(recipe.problem.op)(
                **piece,
                initial_state=state,
                output_final_state=True,
                use_qk_l2norm_in_kernel=recipe.problem.l2norm,
            )
            outputs.append(o)
        whole = torch.cat(outputs, 1)
        found = torch.autograd.grad(
            [whole, state], [*leaves.values()], [grads["o"], grads["final_state"]]
        )
    results = {f"d{name}": x for name, x in zip(leaves, found, strict=True)}
    return {"o": whole.detach(), "final_state": state.detach(), **results}


def bad_calls(right: Tensors) -> dict[str, Tensors]:
    """Case 10 and its like: what is wrong with a call, and the tensors that are."""
    found: dict[str, Tensors] = {
        "a value of another dtype": {"v": right["v"].float()},
        "a state on the CPU": {"initial_state": torch.zeros(2, 4, 128, 128)},
    }
    if "g" in right:
        g = right["g"]
        found |= {
            "a decay per head": {"g": g[..., 0]},
            "a decay without its batch": {"g": g[0]},
            "a decay per head, kept in its dim": {"g": g[..., :1]},
            "a decay of other heads": {"g": g[:, :, :3]},
            "a decay on the CPU": {"g": g.cpu()},
        }
    if "b" in right:
        b, w, g = right["b"], right["w"], right["g"]
        found |= {
            "an erase gate per head": {"b": b[..., 0]},
            "a write gate of the key head dim": {"w": w[..., :64]},
            "gates of other heads": {"g": g[:, :, :3], "b": b[:, :, :3]},
        }
    if "beta" in right:
        beta = right["beta"]
        found |= {
            "a beta per channel": {"beta": beta[..., None]},
            "a beta of other heads": {"beta": beta[:, :, :3]},
            "a beta of a third dtype": {"beta": beta.half()},
            "a beta on the CPU": {"beta": beta.cpu()},
        }
    return found


@pytest.mark.parametrize("op", OPS)
def test_case_10_a_gate_of_the_wrong_rank_launches_nothing(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launched(*_: object, **__: object) -> None:
        raise AssertionError("a kernel was about to be launched")

    monkeypatch.setattr(Pass, "run", launched)
    right = make_inputs(2, 64, 4, 128, 128, op=op, dtype=torch.bfloat16, device=DEVICE)
    for what, wrong in bad_calls(right).items():
        with pytest.raises(InputError):
            public_op(op)(**right | wrong)
            pytest.fail(f"{what} was taken")
    with pytest.raises(AssertionError, match="about to be launched"):
        public_op(op)(**right)
