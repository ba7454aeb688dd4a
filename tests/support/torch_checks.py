"""Checks of the op within torch, by the reference or by interpreted kernels; see op_checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn2gen import chunk_gdn2
from gdn2gen.base.errors import UnsupportedError
from gdn2gen.family.inputs import make_inputs


def make(T: int = 20, H: int = 1, **changes: Any) -> dict[str, Any]:
    sizes = {"B": 1, "T": T, "H": H, "K": 32, "V": 32} | changes
    return {**make_inputs(**sizes)}


def outputs(**arguments: Any) -> Tensor:
    return chunk_gdn2(**arguments, use_qk_l2norm_in_kernel=True)[0]


# torch.func


def func_grad() -> str:
    inputs = make()

    def loss(q: Tensor, w: Tensor) -> Tensor:
        return outputs(**inputs | {"q": q, "w": w}).square().sum()

    leaves = [inputs[name].clone().requires_grad_() for name in ("q", "w")]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.func.grad(loss, argnums=(0, 1))(inputs["q"], inputs["w"])
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    return "done"


def vmap(packed: bool) -> str:
    """Of the op, and of its gradients; over dims of several tensors, and not over all."""
    inputs = make(**({"cu_seqlens": (0, 7, 20)} if packed else {}))
    qs = torch.stack([inputs["q"], inputs["q"] * 2])
    vs = torch.stack([inputs["v"], inputs["v"] * 3], -1)

    def one(q: Tensor, v: Tensor) -> Tensor:
        return outputs(**inputs | {"q": q, "v": v})

    pairs = list(zip(qs, vs.unbind(-1), strict=True))
    found = torch.vmap(one, in_dims=(0, -1))(qs, vs)
    assert torch.equal(found, torch.stack([one(*pair) for pair in pairs]))
    slope = torch.func.grad(lambda q, v: one(q, v).sum())
    found = torch.vmap(slope, in_dims=(0, -1))(qs, vs)
    assert torch.equal(found, torch.stack([slope(*pair) for pair in pairs]))
    return "done"


def jacobian() -> str:
    inputs = make(T=2)

    def few(b: Tensor) -> Tensor:
        return outputs(**inputs | {"b": b})[..., :3].sum((0, 1, 2))

    expected: Any = torch.autograd.functional.jacobian(few, inputs["b"])  # type: ignore[no-untyped-call]
    assert torch.equal(torch.func.jacrev(few)(inputs["b"]), expected)
    return "done"


def _forward_ad() -> None:
    inputs = make()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs["k"], inputs["k"])
        outputs(**inputs | {"k": dual})


def _jvp() -> None:
    inputs = make()
    torch.func.jvp(lambda k: outputs(**inputs | {"k": k}), (inputs["k"],), (inputs["k"],))


def _jacfwd() -> None:
    inputs = make(T=2)
    torch.func.jacfwd(lambda k: outputs(**inputs | {"k": k}).sum())(inputs["k"])


def _twice() -> None:
    inputs = make()
    k = inputs["k"].requires_grad_()
    (slope,) = torch.autograd.grad(outputs(**inputs).square().sum(), k, create_graph=True)
    # pruned to what leads to k: an error that hangs elsewhere would never be raised
    torch.autograd.grad(slope.sum() + k.sum(), k)


def _twice_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        _twice()


def _grad_of_grad() -> None:
    inputs = make()

    def loss(k: Tensor) -> Tensor:
        return outputs(**inputs | {"k": k}).sum()

    torch.func.grad(lambda k: torch.func.grad(loss)(k).sum())(inputs["k"])


REFUSED: dict[str, Callable[[], None]] = {
    "forward_ad": _forward_ad,
    "jvp": _jvp,
    "jacfwd": _jacfwd,
    "twice": _twice,
    "twice counted": _twice_counted,
    "grad of grad": _grad_of_grad,
}


def refused(name: str) -> str:
    with pytest.raises(UnsupportedError, match="can be differentiated once, backwards"):
        REFUSED[name]()
    return "done"


def first_order_of_a_graph() -> str:
    """create_graph=True alone changes no gradient."""
    inputs = make()
    leaves = [x.requires_grad_() for x in inputs.values()]
    expected = torch.autograd.grad(outputs(**inputs).sum(), leaves)
    found = torch.autograd.grad(outputs(**inputs).sum(), leaves, create_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    return "done"


# Tracers


def _train(
    function: Callable[..., Tensor],
    inputs: dict[str, Any],
    seed: Callable[[Tensor], Tensor] = torch.clone,
) -> list[Tensor]:
    leaves = {
        name: x.detach().requires_grad_() if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    o = function(**leaves)
    wanted = [x for x in leaves.values() if x.requires_grad]
    return [o, *torch.autograd.grad(o, wanted, seed(torch.ones_like(o)))]


def compiled_lengths(lengths: Sequence[int], packed: bool, dynamic: bool | None) -> int:
    """How many graphs serve these lengths; each with the bits of eager mode."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(outputs, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for T in lengths:
        inputs = make(T=T, **({"cu_seqlens": (0, 3, T)} if packed else {}))
        found, expected = _train(step, inputs), _train(outputs, inputs)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True)), T
    count: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return count


def marked_dynamic() -> str:
    torch._dynamo.reset()
    inputs = make(T=40)
    for x in inputs.values():
        torch._dynamo.mark_dynamic(x, 1)
    step = torch.compile(outputs, backend="aot_eager", fullgraph=True)
    assert torch.equal(step(**inputs), outputs(**inputs))
    return "done"


def without_data() -> str:
    inputs = make(cu_seqlens=(0, 7, 20), initial_state=True)
    leaves: dict[str, Any] = {
        name: x.to("meta").requires_grad_(x.is_floating_point()) for name, x in inputs.items()
    }
    o, state = chunk_gdn2(**leaves, output_final_state=True)
    assert state is not None
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(o.sum() + state.sum(), [*wanted.values()])
    assert (o.shape, o.dtype) == ((1, 20, 1, 32), torch.float32)
    assert (state.shape, state.dtype) == ((2, 1, 32, 32), torch.float32)
    assert [x.shape for x in grads] == [x.shape for x in wanted.values()]
    return "done"


# Recipes that change


def recipe_changes_before_the_backward(how: str, folder: str) -> str:
    """A tuned file lands between forward and backward, as another process's `tuned import`."""
    import os

    import gdn2gen
    from gdn2gen.base.device import named_device
    from gdn2gen.codegen.render import template_digest
    from gdn2gen.family.problem import Problem, Regime
    from gdn2gen.kernels.recipe import Recipe
    from gdn2gen.store._claims import always_checked
    from gdn2gen.store.tuned_files import Entry, TunedFile, metadata_for, tuned_path, write_tuned

    os.environ["GDN2GEN_TUNED_DIR"] = folder
    problem = Problem(K=32, V=32, dtype="fp32")
    device = named_device("sm_90")
    path = tuned_path(Path(folder), "gdn2", device)

    def land(plan: str, BT: int, **segments: Any) -> None:
        recipe = Recipe.default(problem, plan, BT=BT)
        scan = recipe[recipe.plan.forward[-1]].replace(**segments)
        configs = recipe.with_config(scan).by_stage
        digests = {stage: template_digest(config) for stage, config in configs.items()}
        times = {"forward_ms": 1.0, "forward_backward_ms": 2.0}
        errors = dict.fromkeys(always_checked("gdn2"), 1e-6)
        regime = Regime(tokens=20, sequences=1, heads=1)
        entry = Entry(
            *(problem.key, regime.key, "fast", plan, configs, digests, times, errors, "measured")
        )
        write_tuned(path, TunedFile(metadata_for(device, {}, "test", "2026"), (entry,)))
        gdn2gen.reload()

    def call(**inputs: Any) -> Tensor:
        return outputs(**inputs, disable_recompute=True)

    def checkpointed(**inputs: Any) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        found: Tensor = checkpoint(call, use_reentrant=False, **inputs)
        return found

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    function = {"eager": call, "compiled": compiled, "checkpointed": checkpointed}[how]
    inputs = make()
    land("states", 32)
    expected = _train(call, inputs)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    o = function(**leaves)
    if how == "checkpointed":
        # this process only reads the file again where it is asked to
        path.write_text(path.read_text().replace('"states"', '"fast"'))
    else:
        land("fast", 16, segments="parallel", max_segments=64)
    grads = torch.autograd.grad(o.sum(), [*leaves.values()])
    for x, y in zip([o, *grads], expected, strict=True):
        torch.testing.assert_close(x, y)
    # and with what has landed since
    for x, y in zip(_train(function, inputs), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    return "done"


def lazy_views(packed: bool) -> str:
    """Tensors that torch negates only where it reads them, and views at odd addresses."""
    inputs = make(initial_state=True, **({"cu_seqlens": (0, 7, 20)} if packed else {}))
    expected = _train(outputs, inputs)

    def negated(x: Tensor) -> Tensor:
        return torch._neg_view(-x) if x.is_floating_point() else x

    def shifted(x: Tensor) -> Tensor:
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    for view in (negated, shifted):
        found = _train(outputs, {name: view(x) for name, x in inputs.items()}, view)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True)), view
    return "done"
