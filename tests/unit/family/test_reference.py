"""The reference against the equations, its two forms against each other, and the inputs drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from reference_op import ReferenceOp
from torch import Tensor

from gdn2gen.base.errors import InputError
from gdn2gen.family import mamba2, reference
from gdn2gen.family.activations import activate_gate, l2norm
from gdn2gen.family.inputs import PATTERNS, make_inputs
from gdn2gen.family.registry import RECURRENCES

Form = Callable[..., tuple[Tensor, Tensor]]
RECURRENT = {op: ReferenceOp(op, reference.recurrent) for op in RECURRENCES}
CHUNK = {op: ReferenceOp(op) for op in RECURRENCES}
OF_ANY = pytest.mark.parametrize("form", [*RECURRENT.values(), *CHUNK.values()], ids=str)
recurrent_gdn2, chunk_gdn2 = RECURRENT["gdn2"], CHUNK["gdn2"]
FORMS = pytest.mark.parametrize("form", [recurrent_gdn2, chunk_gdn2], ids=str)
MEMBERS = pytest.mark.parametrize("op", RECURRENCES)
# fp64 rounds at 1e-16; the largest error found is 7e-15, with correlated keys and b near 2.
TOLERANCE = 1e-12


def draw(*sizes: int, **options: Any) -> dict[str, Tensor]:
    """`make_inputs` in fp64, for B, T, H, K, V = `sizes`."""
    inputs = make_inputs(*sizes, dtype=torch.float64, gate_dtype=torch.float64, **options)
    return {name: x if name == "cu_seqlens" else x.double() for name, x in inputs.items()}


def run(
    form: Form,
    inputs: dict[str, Tensor],
    cotangents: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """o, state, and the gradient of every floating input, for dO and dS given or random."""
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.items() if x.is_floating_point()}
    options.setdefault("use_qk_l2norm_in_kernel", True)
    o, state = form(**{**inputs, **leaves}, **options)
    if cotangents is None:
        cotangents = random_like(o), random_like(state)
    grads = torch.autograd.grad((o, state), list(leaves.values()), cotangents, allow_unused=True)
    results = {"o": o.detach(), "state": state.detach()}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        results[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


def random_like(x: Tensor) -> Tensor:
    rng = torch.Generator().manual_seed(x.shape[1])
    return torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x.dtype)


def assert_close(
    found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    """Compare by the norm of the difference over the norm, tensor by tensor."""
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert found[name].shape == x.shape, name
        error, norm = (found[name] - x).norm().item(), x.norm().item()
        assert error <= tolerance * norm, f"{name}: {error / max(norm, 1e-300):.1e}"


def equation(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The paper's equation for one head: [T, D] rows, transition matrices written out."""
    outputs = []
    for t in range(len(q)):
        transition = torch.eye(k.shape[1]).double() - torch.outer(k[t], b[t] * k[t])
        state = transition @ torch.diag(g[t].exp()) @ state + torch.outer(k[t], w[t] * v[t])
        outputs.append(scale * state.T @ q[t])
    return torch.stack(outputs), state


@FORMS
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equation(form: Form, pattern: str) -> None:
    x = draw(2, 21, 2, 8, 12, pattern=pattern, initial_state=True)
    x["q"], x["k"] = l2norm(x["q"]), l2norm(x["k"])
    o, state = form(**x, scale=0.3)
    for n in range(2):
        for h in range(2):
            head = {name: x[name][n, :, h] for name in "qkvgbw"}
            o_nh, state_nh = equation(**head, state=x["initial_state"][n, h], scale=0.3)
            torch.testing.assert_close(o[n, :, h], o_nh, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(state[n, h], state_nh, rtol=1e-12, atol=1e-13)


def kda_outputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Kimi Delta Attention, one head at a time; its usual form: correct the value read at k."""
    o = torch.zeros_like(v)
    for n in range(q.shape[0]):
        for h in range(q.shape[2]):
            memory = torch.zeros(q.shape[3], v.shape[3], dtype=v.dtype)
            for t in range(q.shape[1]):
                memory = memory * torch.exp(g[n, t, h]).unsqueeze(1)
                read = memory.T @ k[n, t, h]
                memory = memory + beta[n, t, h] * torch.outer(k[n, t, h], v[n, t, h] - read)
                o[n, t, h] = memory.T @ q[n, t, h] / math.sqrt(q.shape[3])
    return o


KDA_FORMS = pytest.mark.parametrize("form", [RECURRENT["kda"], CHUNK["kda"]], ids=str)


@KDA_FORMS
def test_kda_is_what_it_is_elsewhere(form: Form) -> None:
    x = draw(2, 37, 2, 8, 12, op="kda")
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (x["q"], x["k"]))
    o, _ = form(**x, use_qk_l2norm_in_kernel=True)
    wanted = kda_outputs(q, k, x["v"], x["g"], x["beta"])
    torch.testing.assert_close(o, wanted, rtol=1e-12, atol=1e-13)


def spread(**arguments: Any) -> tuple[Tensor, Tensor]:
    """KDA by the recurrence of GDN-2: beta in every channel, to erase and to write."""
    beta, v = arguments.pop("beta")[..., None], arguments["v"]
    b = beta.expand(*v.shape[:3], arguments["k"].shape[-1])
    return recurrent_gdn2(**arguments, b=b, w=beta.expand_as(v))


@KDA_FORMS
@pytest.mark.parametrize("pattern", PATTERNS)
def test_kda_is_gdn2_of_one_factor(form: Form, pattern: str) -> None:
    x = draw(2, 37, 2, 8, 12, HV=4, op="kda", pattern=pattern, initial_state=True)
    assert x["beta"].shape == (2, 37, 4)
    assert_close(run(form, x), run(spread, x))


GATED_FORMS = pytest.mark.parametrize(
    "form", [RECURRENT["gated_delta_rule"], CHUNK["gated_delta_rule"]], ids=str
)


@GATED_FORMS
def test_gated_delta_rule_is_its_papers_equation(form: Form) -> None:
    """S_t = a_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, of the transposed state."""
    x = draw(1, 23, 1, 8, 12, op="gated_delta_rule")
    q, k = (l2norm(x[name])[0, :, 0] for name in "qk")
    S, outputs = torch.zeros(12, 8).double(), []
    for t in range(23):
        beta = x["beta"][0, t, 0]
        kept = S @ (torch.eye(8).double() - beta * torch.outer(k[t], k[t]))
        S = x["g"][0, t, 0].exp() * kept + beta * torch.outer(x["v"][0, t, 0], k[t])
        outputs.append(S @ q[t] / math.sqrt(8))
    o, state = form(**x, use_qk_l2norm_in_kernel=True)
    torch.testing.assert_close(o[0, :, 0], torch.stack(outputs), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(state[0, 0], S.T, rtol=1e-12, atol=1e-13)


def constant_over_channels(**arguments: Any) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet by KDA: one decay in every channel."""
    g = arguments.pop("g")[..., None]
    wide = g.expand(*g.shape[:-1], arguments["k"].shape[-1])
    return RECURRENT["kda"](**arguments, g=wide)


@GATED_FORMS
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gated_delta_rule_is_kda_of_one_decay(form: Form, pattern: str) -> None:
    options: dict[str, Any] = {"op": "gated_delta_rule", "pattern": pattern, "initial_state": True}
    x = draw(2, 37, 2, 8, 12, HV=4, **options)
    assert x["g"].shape == (2, 37, 4)
    assert_close(run(form, x), run(constant_over_channels, x))


def forms_of(op: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("form", [RECURRENT[op], CHUNK[op]], ids=str)


@forms_of("delta_rule")
def test_delta_rule_is_its_papers_equation(form: Form) -> None:
    """S_t = S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, of the transposed state."""
    x = draw(1, 23, 1, 8, 12, op="delta_rule")
    q, k = (l2norm(x[name])[0, :, 0] for name in "qk")
    S, outputs = torch.zeros(12, 8).double(), []
    for t in range(23):
        beta = x["beta"][0, t, 0]
        S = S - beta * torch.outer(S @ k[t] - x["v"][0, t, 0], k[t])
        outputs.append(S @ q[t] / math.sqrt(8))
    o, state = form(**x, use_qk_l2norm_in_kernel=True)
    torch.testing.assert_close(o[0, :, 0], torch.stack(outputs), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(state[0, 0], S.T, rtol=1e-12, atol=1e-13)


@forms_of("gla")
def test_gla_is_its_papers_equation(form: Form) -> None:
    """S_t = (alpha_t 1^T) * S_{t-1} + k_t^T v_t, o_t = q_t S_t of rows q_t, k_t, v_t."""
    x = draw(1, 23, 1, 8, 12, op="gla", initial_state=True)
    q, k, v, g = (x[name][0, :, 0] for name in "qkvg")
    S, outputs = x["initial_state"][0, 0], []
    for t in range(23):
        S = g[t].exp()[:, None].expand(8, 12) * S + k[t][:, None] @ v[t][None, :]
        outputs.append(q[t] @ S / math.sqrt(8))
    o, state = form(**x)
    torch.testing.assert_close(o[0, :, 0], torch.stack(outputs), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(state[0, 0], S, rtol=1e-12, atol=1e-13)


@forms_of("simple_gla")
def test_simple_gla_is_its_papers_attention(form: Form) -> None:
    """Mamba-2's dual form: (L * C B^T) X, L_ij the decay from token j to token i."""
    x = draw(1, 23, 1, 8, 12, op="simple_gla")
    C, B, X, g = (x[name][0, :, 0] for name in "qkvg")
    L = torch.stack([torch.stack([g[j + 1 : i + 1].sum() for j in range(23)]) for i in range(23)])
    o, _ = form(**x, scale=1.0)
    wanted = (L.exp().tril() * (C @ B.T)) @ X
    torch.testing.assert_close(o[0, :, 0], wanted, rtol=1e-12, atol=1e-13)


def never_forgetting(**arguments: Any) -> tuple[Tensor, Tensor]:
    """DeltaNet by Gated DeltaNet: a decay of 0."""
    return RECURRENT["gated_delta_rule"](**arguments, g=torch.zeros_like(arguments["beta"]))


def never_erasing(**arguments: Any) -> tuple[Tensor, Tensor]:
    """Gated linear attention by GDN-2: nothing is erased, and all of v written."""
    b, w = torch.zeros_like(arguments["g"]), torch.ones_like(arguments["v"])
    return recurrent_gdn2(**arguments, b=b, w=w)


def of_one_decay(**arguments: Any) -> tuple[Tensor, Tensor]:
    """The simple one by the other: one decay in every channel."""
    g = arguments.pop("g")[..., None]
    return RECURRENT["gla"](**arguments, g=g.expand(*g.shape[:-1], arguments["k"].shape[-1]))


@pytest.mark.parametrize("pattern", ["mixed", "sparse", "correlated"])
@pytest.mark.parametrize(
    ("op", "wider"),
    [("delta_rule", never_forgetting), ("gla", never_erasing), ("simple_gla", of_one_decay)],
)
def test_a_member_is_a_wider_one_with_less(op: str, wider: Form, pattern: str) -> None:
    x = draw(2, 37, 2, 8, 12, HV=4, op=op, pattern=pattern, initial_state=True)
    for form in (RECURRENT[op], CHUNK[op]):
        assert_close(run(form, x), run(wider, x))


@KDA_FORMS
def test_a_beta_of_zero_passes_the_state_on(form: Form) -> None:
    """But for its decay; and beta has a gradient there."""
    x = draw(1, 21, 2, 8, 12, op="kda", pattern="layer", initial_state=True)
    x["beta"][:, 3:] = 0.0
    found = run(form, x)
    first = {name: y[:, :3] for name, y in x.items() if name != "initial_state"}
    state = run(form, first | {"initial_state": x["initial_state"]})["state"]
    kept = x["g"][:, 3:].sum(1).exp()[..., None] * state
    torch.testing.assert_close(found["state"], kept, rtol=1e-12, atol=1e-13)
    assert (found["dbeta"][:, 3:] != 0).all()
    assert (found["dv"][:, 3:] == 0).all()


@KDA_FORMS
@pytest.mark.parametrize("twice", [False, True])
def test_the_sigmoid_of_beta(form: Form, twice: bool) -> None:
    x = draw(2, 37, 2, 8, 12, op="kda", initial_state=True)
    x["beta"] = torch.randn(x["beta"].shape, generator=torch.Generator().manual_seed(3)).double()

    def before(beta: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        return spread(beta=(2 if twice else 1) / (1 + torch.exp(-beta)), **rest)

    options = {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": twice}
    assert_close(run(form, x, **options), run(before, x))


@cache
def hostile(pattern: str, op: str = "gdn2") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and the recurrence's results: 77 tokens end within a chunk of any size."""
    x = draw(2, 77, 2, 24, 40, op=op, pattern=pattern, initial_state=True)
    return x, run(RECURRENT[op], x)


# The others' forms are compared with a wider member's, above.
@pytest.mark.parametrize("op", ["gdn2", "kda", "gated_delta_rule"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_chunk_form_is_the_recurrence(pattern: str, op: str) -> None:
    x, wanted = hostile(pattern, op)
    for chunk_size in (16, 32, 64):
        assert_close(run(CHUNK[op], x, chunk_size=chunk_size), wanted)


@pytest.mark.parametrize("pattern", ["strong", "sparse", "mixed"])
def test_small_decay_gradients_are_exact_too(pattern: str) -> None:
    """dg of a channel that decays by exp(-20) drowns in the norm of all, so channel by channel."""
    x, wanted = hostile(pattern)
    found = run(chunk_gdn2, x)["dg"]
    error = (found - wanted["dg"]).norm(dim=(0, 1)) / wanted["dg"].norm(dim=(0, 1))
    assert error.max().item() < 1e-12


@pytest.mark.parametrize("chunk_size", [16, 64])
def test_full_resets(chunk_size: int) -> None:
    x = draw(1, 70, 2, 8, 12, pattern="sparse", initial_state=True)
    x["g"] = x["g"].masked_fill(x["g"] == -300, -math.inf)
    x["g"][:, 40] = -math.inf
    wanted, found = run(recurrent_gdn2, x), run(chunk_gdn2, x, chunk_size=chunk_size)
    assert all(y.isfinite().all() for y in found.values())
    assert_close(found, wanted)


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 64, 130])
def test_lengths(T: int) -> None:
    x = draw(1, T, 2, 8, 12, pattern="mixed", initial_state=True)
    wanted = run(recurrent_gdn2, x)
    assert_close(run(chunk_gdn2, x, chunk_size=16), wanted)
    assert_close(run(chunk_gdn2, x), wanted)


@OF_ANY
@pytest.mark.parametrize("cu_seqlens", [None, [0, 0]])
def test_no_tokens(form: ReferenceOp, cu_seqlens: list[int] | None) -> None:
    x = draw(1, 0, 2, 8, 12, op=form.op, HV=4, cu_seqlens=cu_seqlens, initial_state=True)
    found = run(form, x)
    assert found["o"].shape == (1, 0, 4, 12)
    assert torch.equal(found["state"], x["initial_state"])
    assert found["state"].data_ptr() != x["initial_state"].data_ptr()
    del x["initial_state"]
    assert torch.equal(form(**x)[1], torch.zeros(1, 4, 8, 12).double())


@OF_ANY
def test_packed_sequences(form: ReferenceOp) -> None:
    """Each of the packed sequences, empty ones included, is what it is on its own."""
    ends = [0, 0, 17, 17, 80, 81, 81]
    x = draw(1, 81, 2, 8, 12, op=form.op, HV=4, cu_seqlens=ends, initial_state=True)
    packed = run(form, x)
    do, ds = random_like(packed["o"]), random_like(packed["state"])
    for n, (start, end) in enumerate(pairwise(ends)):
        tokens, entry = slice(start, end), slice(n, n + 1)
        own = {y.name: x[y.name][:, tokens] for y in form.recurrence.required}
        own["initial_state"] = x["initial_state"][entry]
        alone = run(form, own, (do[:, tokens], ds[entry]))
        states = ("state", "dinitial_state")
        assert_close(
            alone,
            {
                name: packed[name][entry if name in states else (slice(None), tokens)]
                for name in alone
            },
        )
        if start == end:
            assert torch.equal(packed["state"][entry], x["initial_state"][entry])
            assert torch.equal(packed["dinitial_state"][entry], ds[entry])


@OF_ANY
@pytest.mark.parametrize("gate_heads", [2, 6])
def test_grouped_value_heads(form: ReferenceOp, gate_heads: int) -> None:
    x = draw(2, 37, 2, 8, 12, op=form.op, HV=6, HG=gate_heads, initial_state=True)

    def repeated(**inputs: Any) -> tuple[Tensor, Tensor]:
        for name in [y.name for y in form.recurrence.required]:
            heads = inputs[name].shape[2]
            inputs[name] = inputs[name][:, :, [i // (6 // heads) for i in range(6)]]
        return form(**inputs)

    assert_close(run(form, x), run(repeated, x))


@FORMS
def test_state_v_first(form: Form) -> None:
    x = draw(2, 37, 2, 8, 12, initial_state=True)
    o, state = form(**x, use_qk_l2norm_in_kernel=True)
    x["initial_state"] = x["initial_state"].mT.contiguous()
    o_v_first, state_v_first = form(**x, use_qk_l2norm_in_kernel=True, state_v_first=True)
    assert state_v_first.shape == (2, 2, 12, 8)
    assert o.is_contiguous() and state.is_contiguous() and state_v_first.is_contiguous()
    assert torch.equal(o, o_v_first)
    assert torch.equal(state, state_v_first.mT)


@FORMS
def test_l2norm_and_scale(form: Form) -> None:
    x = draw(2, 37, 2, 16, 12)
    o, state = form(**x, use_qk_l2norm_in_kernel=True)
    unit = {**x, **{n: x[n] / torch.sqrt((x[n] ** 2).sum(-1, keepdim=True) + 1e-6) for n in "qk"}}
    for scale, factor in ((None, 1.0), (0.25, 1.0), (1.0, 4.0)):
        o_unit, state_unit = form(**unit, scale=scale)
        torch.testing.assert_close(o_unit, o * factor, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(state_unit, state, rtol=1e-12, atol=1e-13)


GATES: dict[str, dict[str, Any]] = {"softplus": {}, "sigmoid": {"lower_bound": -5.0}}


@pytest.mark.parametrize("flat_bias", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_gates_in_kernel(gate: str, flat_bias: bool) -> None:
    """Both forms activate alike, and as if activated before; gradients reach A_log and dt_bias."""
    x = draw(2, 37, 2, 8, 12, HV=4, initial_state=True)
    rng = torch.Generator().manual_seed(2)
    x["g"] = torch.randn(x["g"].shape, generator=rng).double()
    x["A_log"] = torch.empty(4).double().uniform_(0, math.log(16), generator=rng)
    bias = torch.randn(4, 8, generator=rng).double() - 3
    x["dt_bias"] = bias.flatten() if flat_bias else bias

    def activated_before(g: Tensor, A_log: Tensor, dt_bias: Tensor, **rest: Any) -> Any:
        return recurrent_gdn2(g=activate_gate(g, A_log, dt_bias, **GATES[gate]), **rest)

    wanted = run(activated_before, x)
    options = {"use_gate_in_kernel": True, **GATES[gate]}
    assert all(wanted[name].norm() > 0 for name in ("dg", "dA_log", "ddt_bias"))
    assert_close(run(recurrent_gdn2, x, **options), wanted)
    assert_close(run(chunk_gdn2, x, chunk_size=16, **options), wanted)


def test_activate_gate_formulas() -> None:
    g = torch.tensor([-30.0, -1.0, 0.5, 25.0, 100.0]).double().view(1, 1, 1, 5).repeat(1, 1, 2, 1)
    A_log, bias = torch.tensor([0.0, 1.5]).double(), torch.linspace(-1, 1, 10).double()
    softplus = activate_gate(g, A_log, bias)
    sigmoid = activate_gate(g, A_log, bias, lower_bound=-5.0)
    plain = activate_gate(g, None, bias, lower_bound=-5.0)
    for h in range(2):
        for d in range(5):
            x, A = g[0, 0, h, d].item() + bias[5 * h + d].item(), math.exp(A_log[h].item())
            stable = max(x, 0.0) + math.log1p(math.exp(-abs(x)))
            assert softplus[0, 0, h, d].item() == pytest.approx(-A * stable, rel=1e-14)
            assert sigmoid[0, 0, h, d].item() == pytest.approx(-5 / (1 + math.exp(-A * x)), 1e-14)
            assert plain[0, 0, h, d].item() == pytest.approx(-5 / (1 + math.exp(-x)), 1e-14)


@OF_ANY
def test_causality(form: ReferenceOp) -> None:
    """The last of 22 tokens moves nothing before it, bit for bit, forward and backward."""
    x = draw(1, 22, 2, 16, 24, op=form.op, pattern="mixed")
    moved = {name: y.clone() for name, y in x.items()}
    for y in moved.values():
        y[:, 21] *= 0.5
    if "g" in moved:
        moved["g"][:, 21] -= 3.0
    results = []
    for inputs in (x, moved):
        leaves = {name: y.requires_grad_() for name, y in inputs.items()}
        o, _ = form(**leaves, use_qk_l2norm_in_kernel=True)
        assert not o[:, 21].isnan().any()
        results.append([o, *torch.autograd.grad(o[:, :21].sum(), list(leaves.values()))])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[:, :21], after[:, :21])
    assert not torch.equal(results[0][0][:, 21], results[1][0][:, 21])


@OF_ANY
@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(gate: str, form: ReferenceOp) -> None:
    member = form.recurrence
    x = draw(1, 7, 1, 3, 2, op=form.op, HV=2, initial_state=True)
    options: dict[str, Any] = {"use_qk_l2norm_in_kernel": True}
    gated = "dt_bias" in member.named
    if gate != next(iter(GATES)) and not (gated and "A_log" in member.named):
        pytest.skip("nothing is taken through such a gate")
    if gated:
        bias = torch.full((6 if member.decays_by == "channel" else 2,), -0.5).double()
        x |= {"A_log": torch.tensor([0.2, 0.7]).double(), "dt_bias": bias}
        options |= {"use_gate_in_kernel": True, **GATES[gate]}
    if member.stepped:
        del x["A_log"]
        x |= {"rate": torch.tensor([-0.4, -1.3]).double(), "D": torch.rand(2, 2).double()}
        x["z"] = torch.randn(1, 7, 2, 2).double()
    names, leaves = list(x), [y.requires_grad_() for y in x.values()]
    if form in CHUNK.values():
        options["chunk_size"] = 4
    if member.tied:
        options |= {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return form(**dict(zip(names, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(call, leaves)


@FORMS
@pytest.mark.parametrize(
    ("dtype", "gate_dtype", "compute_dtype", "state_dtype"),
    [
        (torch.bfloat16, torch.float32, None, torch.float32),
        (torch.bfloat16, torch.float32, torch.float64, torch.float64),
        (torch.float32, torch.float64, None, torch.float64),
        (torch.float64, torch.float64, torch.float32, torch.float32),
    ],
)
def test_dtypes(
    form: Form,
    dtype: torch.dtype,
    gate_dtype: torch.dtype,
    compute_dtype: torch.dtype | None,
    state_dtype: torch.dtype,
) -> None:
    x = make_inputs(1, 37, 2, 8, 12, dtype=dtype, gate_dtype=gate_dtype, initial_state=True)
    found = run(form, x, compute_dtype=compute_dtype)
    assert (found["o"].dtype, found["state"].dtype) == (dtype, state_dtype)
    assert all(found[f"d{name}"].dtype == x[name].dtype for name in x)
    exact = run(recurrent_gdn2, {name: y.double() for name, y in x.items()})
    rounding = max(torch.finfo(dtype).eps, torch.finfo(state_dtype).eps)
    assert (found["o"] - exact["o"]).norm() <= 4 * rounding * exact["o"].norm()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_float32_is_near(pattern: str) -> None:
    """Single precision loses no more than its rounding; 4e-6 where the inverse amplifies it."""
    x, wanted = hostile(pattern)
    found = run(chunk_gdn2, {name: y.float() for name, y in x.items()})
    assert_close(found, {name: y.float() for name, y in wanted.items()}, tolerance=2e-5)


@FORMS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 9, 8)}, r"q and v must be \[B, T, heads, dim\]"),
        ({"k": torch.zeros(1, 9, 1, 8)}, r"k must be \[1, 9, 2, 8\], but got \[1, 9, 1, 8\]"),
        ({"g": torch.zeros(1, 9, 2)}, r"g must be \[1, 9, 2 or 4, 8\], but got \[1, 9, 2\]"),
        ({"b": torch.zeros(1, 9, 4, 1)}, r"b must be .*, but got \[1, 9, 4, 1\]"),
        ({"w": torch.zeros(1, 8, 4, 12)}, r"w must be \[1, 9, 4, 12\]"),
        ({"v": torch.zeros(1, 9, 3, 12)}, "multiple of those of q, but got 3 and 2"),
        ({"initial_state": torch.zeros(1, 4, 12, 8)}, r"initial_state must be \[1, 4, 8, 12\]"),
        (
            {"initial_state": torch.zeros(1, 4, 8, 12), "state_v_first": True},
            r"must be \[1, 4, 12, 8\], but got \[1, 4, 8, 12\]",
        ),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 9])}, r"rise from 0 to T=9, but got \[0, 5, 4, 9\]"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "rise from 0 to T=9"),
        ({"cu_seqlens": torch.tensor([1, 9])}, "rise from 0 to T=9"),
        ({"cu_seqlens": torch.tensor([[0, 9]])}, r"must be \[N \+ 1\], but got \[1, 2\]"),
        ({"A_log": torch.zeros(4)}, "need use_gate_in_kernel=True"),
        ({"use_gate_in_kernel": True}, "needs A_log"),
        ({"use_gate_in_kernel": True, "lower_bound": 5.0}, "must be negative, but got 5.0"),
        ({"use_gate_in_kernel": True, "A_log": torch.zeros(2)}, r"A_log must be \[4\]"),
        (
            {"use_gate_in_kernel": True, "A_log": torch.zeros(4), "dt_bias": torch.zeros(8)},
            r"dt_bias must be \[32\] or \[4, 8\]",
        ),
        ({"compute_dtype": torch.bfloat16}, "must be torch.float32 or torch.float64"),
        ({"use_beta_sigmoid_in_kernel": True}, "gdn2 has no beta whose sigmoid could be taken"),
        ({"w": None}, r"gdn2 takes \['q', .*missing or unknown: \['w'\]"),
    ],
)
def test_bad_input(form: Form, change: dict[str, Any], message: str) -> None:
    x: dict[str, Any] = make_inputs(1, 9, 2, 8, 12, HV=4)
    with pytest.raises(InputError, match=message):
        form(**{**x, **change})


@KDA_FORMS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": torch.zeros(1, 9, 2)}, r"beta must be \[1, 9, 4\], but got \[1, 9, 2\]"),
        ({"beta": torch.zeros(1, 9, 4, 1)}, r"beta must be .*, but got \[1, 9, 4, 1\]"),
        ({"allow_neg_eigval": True}, "needs use_beta_sigmoid_in_kernel=True"),
    ],
)
def test_a_bad_beta(form: Form, change: dict[str, Any], message: str) -> None:
    x: dict[str, Any] = make_inputs(1, 9, 2, 8, 12, op="kda", HV=4)
    with pytest.raises(InputError, match=message):
        form(**{**x, **change})


def test_what_a_recurrence_lacks_is_refused() -> None:
    x = make_inputs(1, 9, 2, 8, 12, op="kda")
    with pytest.raises(InputError, match=r"kda takes .*missing or unknown: \['w'\]"):
        reference.chunk(RECURRENCES["kda"], x | {"w": x["v"]})


def test_bad_chunks_and_batches() -> None:
    x: dict[str, Any] = make_inputs(2, 9, 2, 8, 12)
    with pytest.raises(InputError, match="power of two, but got 48"):
        chunk_gdn2(**x, chunk_size=48)
    with pytest.raises(InputError, match="B=1, but got B=2"):
        chunk_gdn2(**x, cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(InputError, match="pattern must be one of"):
        make_inputs(1, 9, 2, 8, 12, pattern="gentle")
    with pytest.raises(InputError, match="B=1, but got B=2"):
        make_inputs(2, 9, 2, 8, 12, cu_seqlens=[0, 9])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_make_inputs(pattern: str) -> None:
    sizes = (1, 50, 2, 16, 24)
    options: dict[str, Any] = {"pattern": pattern, "dtype": torch.bfloat16, "HV": 4}
    options.update(cu_seqlens=(0, 20, 50), initial_state=True)
    x, again = make_inputs(*sizes, **options), make_inputs(*sizes, **options)
    other = make_inputs(*sizes, **options, seed=1)
    assert {name: tuple(y.shape) for name, y in x.items()} == {
        "q": (1, 50, 2, 16),
        "k": (1, 50, 2, 16),
        "v": (1, 50, 4, 24),
        "b": (1, 50, 4, 16),
        "w": (1, 50, 4, 24),
        "g": (1, 50, 4, 16),
        "initial_state": (2, 4, 16, 24),
        "cu_seqlens": (3,),
    }
    assert all(x[name].dtype == torch.bfloat16 for name in "qkvbw")
    assert x["g"].dtype == x["initial_state"].dtype == torch.float32
    assert all(torch.equal(x[name], again[name]) for name in x)
    assert not torch.equal(x["q"], other["q"])
    assert all(y.isfinite().all() for y in x.values())
    assert x["g"].max() <= 0


def test_patterns_are_what_they_say() -> None:
    def decay(pattern: str) -> Tensor:
        return make_inputs(2, 500, 4, 32, 8, pattern=pattern)["g"]

    assert decay("zero").eq(0).all()
    assert decay("constant").eq(-5.95).all()
    assert decay("strong").eq(-20).all()
    assert decay("uniform").mean().item() == pytest.approx(-10, abs=0.1)
    assert decay("sparse").eq(-300).float().mean().item() == pytest.approx(1 / 64, rel=0.05)
    # Mean step 0.021, exp(0.125) from the normal, mean A 8.5: but few heads and channels.
    assert decay("layer").mean().item() == pytest.approx(-0.21, rel=0.5)
    zeros = decay("mixed").eq(0).all(1)
    assert zeros.any() and not zeros.all()

    x = make_inputs(1, 200, 2, 64, 8, pattern="correlated", dtype=torch.float64)
    assert x["b"].min() > 1.9 and x["b"].max() <= 2
    unit = l2norm(x["k"])[0, :, 0]
    assert (unit @ unit.T).mean().item() == pytest.approx(0.9, abs=0.05)

    beta = make_inputs(1, 500, 4, 8, 8, op="kda", pattern="correlated")["beta"]
    assert beta.min() > 1.9 and beta.max() <= 2
    beta = make_inputs(1, 500, 4, 8, 8, op="kda", pattern="sparse")["beta"]
    assert beta.eq(0).float().mean().item() == pytest.approx(1 / 8, rel=0.1)


@forms_of("mamba2")
@pytest.mark.parametrize("gated", [False, True])
def test_mamba2_is_its_papers_recurrence(form: Form, gated: bool) -> None:
    """Told in its own words, P before N; with what follows the state."""
    x = draw(2, 37, 2, 8, 12, op="mamba2", HV=4, initial_state=True, rate=True)
    rng = torch.Generator().manual_seed(0)
    x["D"] = torch.randn(4, 12, generator=rng).double()
    x["z"] = torch.randn(2, 37, 4, 12, generator=rng).double()
    if gated:
        x["dt_bias"] = torch.randn(4, generator=rng).double()
    own = {"x": "v", "dt": "dt", "A": "rate", "B": "k", "C": "q", "D": "D", "z": "z"}
    given = {name: x[ours] for name, ours in own.items()}
    out, states = mamba2.recurrent(
        **given,
        dt_bias=x.get("dt_bias"),
        initial_states=x["initial_state"].mT,
        dt_softplus=gated,
    )
    found, state = form(**x, use_gate_in_kernel=gated)
    assert_close({"o": found, "state": state.mT}, {"o": out, "state": states})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("op", "name"), [(op, x.name) for op, y in RECURRENCES.items() for x in y.required]
)
def test_what_is_not_finite_reaches_no_earlier_token(op: str, name: str, value: float) -> None:
    """As in the recurrence, also in its own chunk: nothing is multiplied by a masked zero."""
    x = draw(1, 40, 2, 8, 12, op=op, initial_state=True)
    clean, _ = CHUNK[op](**x, use_qk_l2norm_in_kernel=True)
    x[name][0, 21, 0].view(-1)[-1:] = -value if name == "g" else value
    o, state = CHUNK[op](**x, use_qk_l2norm_in_kernel=True)
    right, right_state = RECURRENT[op](**x, use_qk_l2norm_in_kernel=True)
    assert torch.equal(o[:, :21], clean[:, :21])
    assert torch.equal(o[:, :, 1], clean[:, :, 1])
    assert torch.equal(o.isfinite(), right.isfinite())
    assert torch.equal(state.isfinite(), right_state.isfinite())
