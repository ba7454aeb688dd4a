"""Checks of the op as torch sees it, over the kernels in Triton's interpreter.

They need TRITON_INTERPRET=1 before triton is imported, so test_ops.py calls them in a process of
its own. Each raises AssertionError, or returns what is to be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from reference_op import ReferenceOp
from torch import Tensor

from gdn2gen.base.environment import verifying
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import recurrence_named
from gdn2gen.kernels.plans import level_of, plans_of
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.accuracy import public_op, relative_errors
from gdn2gen.ops import chunk
from gdn2gen.runtime import call
from gdn2gen.runtime._kernels import request_of, sequences_of
from gdn2gen.runtime.autograd import Op
from gdn2gen.runtime.lookup import NOTHING, agree
from gdn2gen.store.dispatch import forced_recipe

LIMIT = 1e-5


def activated(op: str) -> dict[str, bool]:
    """The flags by which kernels activate all that they can of the op's inputs."""
    member = recurrence_named(op)
    flags = ("use_gate_in_kernel", "use_qk_l2norm_in_kernel")
    if member.tied:
        flags += ("use_beta_sigmoid_in_kernel", "allow_neg_eigval")
    return dict.fromkeys(filter(member.takes, flags), True)


def normalised(op: str) -> dict[str, bool]:
    """The flag by which kernels normalise q and k, where they can."""
    return {"use_qk_l2norm_in_kernel": True} if recurrence_named(op).normalises else {}


def has_gate(op: str) -> bool:
    """Whether kernels can take the decay through its activation, with A_log and a bias."""
    return "A_log" in recurrence_named(op).named


def bias_shape(op: str, heads: int = 2) -> tuple[int, ...]:
    """Of dt_bias with all its dims, of so many heads that decay, beside K=32."""
    sizes = {"HG": heads, "K": 32}
    return tuple(sizes[x] for x in recurrence_named(op).named["dt_bias"].symbols)


def gate_parameters(op: str, heads: int = 2) -> dict[str, Tensor]:
    """A_log, and a dt_bias whose dims come as one; none where there is no gate."""
    if not has_gate(op):
        return {}
    return {
        "A_log": torch.zeros(heads),
        "dt_bias": torch.linspace(0, 1, prod(bias_shape(op, heads))),
    }


def make(op: str = "gdn2", **changes: Any) -> dict[str, Any]:
    """Inputs of B=2, T=20, H=2, K=32, V=64 with an initial state, unless told otherwise."""
    sizes = {"B": 2, "T": 20, "H": 2, "K": 32, "V": 64, "initial_state": True} | changes
    return {**make_inputs(op=op, **sizes)}


def compare(
    op: str, arguments: Mapping[str, Any], outputs: str = "both", wanted: tuple[str, ...] = ()
) -> dict[str, float]:
    """Relative errors of outputs and gradients against fp64, for the loss that `outputs` names;
    gradients of all inputs if none is `wanted`."""
    results = _run(public_op(op), arguments, outputs, wanted)
    exact = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }

    def reference(*, output_final_state: bool, **given: Any) -> tuple[Tensor, Tensor]:
        return ReferenceOp(op)(**given)

    return relative_errors(results, _run(reference, exact, outputs, wanted))


@verifying()
def _run(
    function: Any,
    arguments: Mapping[str, Any],
    outputs: str = "both",
    wanted: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    leaves = {
        name: x.detach().requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point() and (not wanted or name in wanted)
        else x
        for name, x in arguments.items()
    }
    o, state = function(**leaves, output_final_state=True)
    # sums: the gradients that arrive are expanded scalars, with strides of 0
    loss = {
        "o": o.float().sum(),
        "final_state": state.sum(),
        "both": o.float().sum() + 2 * state.sum(),
    }[outputs]
    names = [name for name, x in leaves.items() if getattr(x, "requires_grad", False)]
    grads = torch.autograd.grad(loss, [leaves[name] for name in names], allow_unused=True)
    zeros = [
        torch.zeros_like(leaves[name]) if grad is None else grad
        for name, grad in zip(names, grads, strict=True)
    ]
    found = {f"d{name}": grad for name, grad in zip(names, zeros, strict=True)}
    return {"o": o.detach(), "final_state": state.detach()} | found


def _strided(x: Tensor, how: str) -> Tensor:
    """The same values in another layout."""
    if how == "heads-first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "padded":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if how == "every-other":
        return x.repeat_interleave(2, 1)[:, ::2]
    raise ValueError(how)


LAYOUTS = ("heads-first", "padded", "every-other")


def strided_inputs(op: str, how: str) -> dict[str, float]:
    """Strided inputs, an expanded state and gate parameters from a larger tensor."""
    inputs = make(op)
    for name in [x.name for x in recurrence_named(op).required]:
        inputs[name] = _strided(inputs[name], how)
        assert not inputs[name].is_contiguous()
    inputs["initial_state"] = inputs["initial_state"][:1].mT.contiguous().mT.expand(2, -1, -1, -1)
    if has_gate(op):
        inputs["A_log"] = torch.linspace(0, 1, 4)[::2]
        shape = bias_shape(op)
        inputs["dt_bias"] = torch.linspace(0, 1, 2 * prod(shape)).view(*shape, 2)[..., 0]
        assert not (inputs["A_log"].is_contiguous() or inputs["dt_bias"].is_contiguous())
    return compare(op, inputs | activated(op))


def one_output(op: str, outputs: str) -> dict[str, float]:
    """A loss of one output alone; the other's gradient is undefined."""
    return compare(op, make(op) | normalised(op), outputs)


def some_gradients(op: str, name: str) -> dict[str, float]:
    """Only one input requires a gradient."""
    return compare(op, make(op) | normalised(op), wanted=(name,))


def no_tokens(op: str, packed: bool) -> dict[str, float]:
    shape: dict[str, Any] = {"B": 1, "cu_seqlens": (0, 0, 0)} if packed else {}
    return compare(op, make(op, T=0, **shape) | normalised(op))


@verifying()
def low_precision_parameters(op: str) -> str:
    """A_log and dt_bias of a model in bfloat16: gradients in their own dtype and shape."""
    inputs = make(op)
    leaves: dict[str, Any] = {
        name: x.bfloat16().requires_grad_() for name, x in gate_parameters(op).items()
    }
    o, _ = public_op(op)(**inputs, **leaves, **activated(op))
    torch.autograd.backward(o.sum())
    for x in leaves.values():
        assert x.grad is not None
        assert x.grad.dtype == torch.bfloat16 and x.grad.shape == x.shape
        assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    return "done"


def changed_cu_seqlens(op: str) -> dict[str, float]:
    """The tables made from cu_seqlens follow it when it is written to."""
    inputs = make(op, B=1, cu_seqlens=(0, 7, 20)) | normalised(op)
    compare(op, inputs)
    inputs["cu_seqlens"][1] = 15
    return compare(op, inputs)


def inputs_are_untouched(op: str) -> str:
    inputs = make(op) | gate_parameters(op)
    before = {name: x.clone() for name, x in inputs.items()}
    compare(op, inputs | activated(op))
    assert all(torch.equal(inputs[name], x) for name, x in before.items())
    return "done"


WIDE_BETA = {"dtype": torch.bfloat16, "factor_dtype": torch.float32}


def wide_beta(op: str, flags: Mapping[str, bool]) -> dict[str, float]:
    """beta in fp32 beside a q in bf16; its gradient is in fp32 too."""
    arguments = make(op, **WIDE_BETA) | {"use_qk_l2norm_in_kernel": True, **flags}
    found = _run(public_op(op), arguments)
    assert found["dbeta"].dtype == torch.float32 and found["dk"].dtype == torch.bfloat16
    assert (found["dbeta"] != found["dbeta"].bfloat16()).any()
    return compare(op, arguments)


def opcheck(
    op: str, tests: tuple[str, ...], gated: bool, level: str, wide: bool = False
) -> dict[str, str]:
    """torch.library.opcheck of the forward op; by the reference at the level `NOTHING`."""
    dtypes = WIDE_BETA if wide else {}
    inputs = make(op, cu_seqlens=(0, 7, 20), B=1, **dtypes) if gated else make(op, T=17, **dtypes)
    activates = gated and has_gate(op)
    given = {**inputs}
    if activates:
        given |= {"A_log": torch.zeros(2), "dt_bias": torch.ones(bias_shape(op))}
    ops: Op = getattr(chunk, f"_{op.upper()}")
    signature = ops.signature
    leaves = [given[x].requires_grad_() if x in given else None for x in signature.names[:-1]]
    arguments = (*leaves, inputs.get("cu_seqlens"))
    # of beta come last, as in `Options`
    normalises = recurrence_named(op).normalises
    flags = (None, None, normalises, activates, True, False, gated, gated)[: signature.options]
    agreement = level
    if level != NOTHING:
        request = request_of(signature, leaves, sequences_of(arguments[-1]), flags)
        agreement = agree(request, level)
    arguments = (*arguments, *flags, agreement)
    # what lies between the tensors in the buffer of what is saved is then not left to chance
    torch.use_deterministic_algorithms(True)
    try:
        return torch.library.opcheck(ops.forward, arguments, test_utils=tests)
    finally:
        torch.use_deterministic_algorithms(False)


@verifying()
def fakes_agree(op: str, level: str, gated: bool) -> str:
    """Shapes, dtypes and strides of the real outputs, as the fake says, also of the backward."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs: dict[str, Any] = make(op, HV=4, HG=2) if not gated else make(op, HV=4, HG=4)
    parameters = gate_parameters(op, heads=4) if gated else {}
    flags = activated(op) if gated else normalised(op)
    arguments: dict[str, Any] = {**inputs, **parameters, **flags}
    arguments["disable_recompute"] = level == "fast"
    arguments["output_final_state"] = True

    def run(given: dict[str, Any]) -> list[Tensor]:
        leaves: dict[str, Any] = {
            name: x.detach().requires_grad_() if isinstance(x, Tensor) else x
            for name, x in given.items()
        }
        o, state = public_op(op)(**leaves)
        assert state is not None
        wanted = [x for x in leaves.values() if isinstance(x, Tensor)]
        return [o, state, *torch.autograd.grad(o.sum() + state.sum(), wanted)]

    real = run(arguments)
    with FakeTensorMode() as mode:
        fake = run(
            {
                name: mode.from_tensor(x) if isinstance(x, Tensor) else x
                for name, x in arguments.items()
            }
        )
    for x, y in zip(real, fake, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
    return "done"


def compiled(op: str, gated: bool, wide: bool = False) -> str:
    """torch.compile without graph breaks, over the kernels: the same bits as without."""
    inputs: dict[str, Any] = make(op, **(WIDE_BETA if wide else {}))
    if gated:
        inputs |= gate_parameters(op) | activated(op)
    arguments = {**inputs, **normalised(op)}
    step = torch.compile(public_op(op), backend="aot_eager", fullgraph=True)
    expected = _run(public_op(op), arguments)
    results = _run(step, arguments)
    moved = [name for name, x in expected.items() if not torch.equal(x, results[name])]
    assert not moved, moved
    return "done"


def compiled_at_other_lengths(op: str) -> str:
    """torch.compile marks T dynamic when it meets a second one."""
    step = torch.compile(public_op(op), backend="aot_eager", fullgraph=True)
    for T in (20, 33, 47):
        arguments = {**make(op, T=T), **normalised(op)}
        expected = _run(public_op(op), arguments)
        results = _run(step, arguments)
        assert all(torch.equal(x, results[name]) for name, x in expected.items())
    return "done"


def compiled_at_other_head_dims(op: str) -> str:
    """torch.compile marks K and V dynamic when it meets a second one; what was not verified runs
    where that is wanted, and is refused by name where it is not."""
    with verifying():
        step = torch.compile(public_op(op), backend="aot_eager", fullgraph=True)
        for D in (24, 40, 72):
            arguments = {**make(op, T=20, K=D, V=D), **normalised(op)}
            expected = _run(public_op(op), arguments)
            results = _run(step, arguments)
            assert all(torch.equal(x, results[name]) for name, x in expected.items())
    torch._dynamo.reset()
    try:
        torch.compile(public_op(op), backend="aot_eager", fullgraph=True)(**arguments)
    except Exception as error:
        return str(error)
    return "not refused"


def without_gradient(op: str, plan: str) -> list[str]:
    """Outputs that are not the same bits where no gradient is wanted, over three segments."""
    segment, call.SEGMENT = call.SEGMENT, 1
    problem = Problem(op=op, K=32, V=64, dtype="fp32", initial_state=True, final_state=True)
    arguments = {**make(op, T=70), **normalised(op)}
    try:
        served = recurrence_named(op).plans
        plan = plan if plan in served else plans_of(level_of(plan), op)[0]
        with forced_recipe(Recipe.default(problem, plan)):
            kept = _run(public_op(op), arguments)
            o, state = public_op(op)(**arguments, output_final_state=True)
    finally:
        call.SEGMENT = segment
    found = {"o": o, "final_state": state}
    return [name for name, x in found.items() if not torch.equal(x, kept[name])]
