"""Arguments of the ops over a few tokens that are refused, and in which words."""

from __future__ import annotations

from typing import Any, Final

import pytest
import torch
from decoding_cases import Case, draw, public_op
from decoding_torch_checks import plan

from gdn2gen.base.environment import interpreted, verifying
from gdn2gen.base.errors import InputError, UnsupportedError


def call(case: Case, **changes: Any) -> Any:
    drawn = draw(case, "cpu")
    given = {**drawn.inputs, **drawn.serving, **case.flags}
    changed = {
        name: x(given.get(name)) if callable(x) and not isinstance(x, torch.Tensor) else x
        for name, x in changes.items()
    }
    return public_op(case.op)(**given | changed)


POOL, TREE, PACKED = Case(), Case(states="speculative", T=3), Case(lengths=(1, 2))
INITIAL, GATED = Case(states="initial"), Case(op="kda", gate="softplus")
BAD: Final[dict[str, tuple[Case, dict[str, Any], str]]] = {
    "no tensor": (POOL, {"q": None}, "q must be a tensor, but got NoneType"),
    "a list": (POOL, {"state_pool": [1]}, "state_pool must be a tensor or None, but got list"),
    "rank": (POOL, {"g": lambda x: x[0]}, r"g must be \[B, T, heads, dim\] with 4 dimensions"),
    "shape": (POOL, {"b": lambda x: x[..., :8]}, r"b must be \(3, 1, 2, 32\), but got"),
    "dtype": (POOL, {"k": lambda x: x.half()}, "k must have the dtype of q"),
    "flag": (POOL, {"state_v_first": 1}, "state_v_first must be True or False, but got 1"),
    "scale": (POOL, {"scale": "1"}, "scale must be a number, but got str"),
    "an equal scale": (Case(scale=1.0), {"scale": True}, "must be a number, but got bool"),
    "gate": (POOL, {"use_gate_in_kernel": True}, "needs A_log, or lower_bound"),
    "bound": (GATED, {"lower_bound": -9.0}, "`-5 <= lower_bound < 0` must hold"),
    "beta": (GATED, {"allow_neg_eigval": True}, "needs use_beta_sigmoid_in_kernel=True"),
    "state": (INITIAL, {"initial_state": lambda x: x[:2]}, r"initial_state must be \(3, 2, 32"),
    "state's dtype": (INITIAL, {"initial_state": lambda x: x.half()}, "float32 or bfloat16"),
    "two states": (INITIAL, {"state_pool": lambda _: torch.zeros(3, 2, 32, 32)},
     "initial_state and state_pool were given"),
    "pool's shape": (POOL, {"state_pool": lambda x: x[:, :1]}, r"must be \[slots, 2, 32, 32\]"),
    "pool's rank": (POOL, {"state_pool": lambda x: x[0]}, r"state_pool must be \[slots"),
    "pool's dtype": (POOL, {"state_pool": lambda x: x.half()}, "state_pool must be float32 or bf"),
    "few slots": (Case(states="slots"), {"state_pool": lambda x: x[:2]},
     "a slot for each of N=3 sequences, but has 2"),
    "no pool": (POOL, {"state_pool": None}, "ssm_state_indices name slots of state_pool"),
    "indices' shape": (POOL, {"ssm_state_indices": lambda x: x[:2]},
     r"must be \[N\] or \[N, 1\+S\] with N=3 sequences, but got \(2,\)"),
    "indices' dtype": (POOL, {"ssm_state_indices": lambda x: x.float()}, "int32 or int64"),
    "few indices": (TREE, {"ssm_state_indices": lambda x: x[:, :2]}, "for each of T=3 tokens"),
    "no columns": (TREE, {"ssm_state_indices": lambda x: x[:, :0]}, r"\[N, 1\+S\]"),
    "accepted alone": (POOL, {"num_accepted_tokens": torch.ones(3, dtype=torch.int32)},
     r"says which slot of ssm_state_indices \[N, 1\+S\] is read"),
    "accepted's shape": (TREE, {"num_accepted_tokens": torch.ones(2, dtype=torch.int32)},
     r"num_accepted_tokens must be \[N\] with N=3"),
    "accepted's dtype": (TREE, {"num_accepted_tokens": torch.ones(3)}, "must be int32 or int64"),
    "null slot": (POOL, {"null_slot": 0.0}, "null_slot must be an int or None, but got float"),
    "null slot too wide": (POOL, {"null_slot": 2**70}, "null_slot must be an index, which has 64"),
    "null slot alone": (INITIAL, {"null_slot": 0}, "null_slot is of ssm_state_indices"),
    "out's shape": (POOL, {"out": torch.zeros(3, 1, 2, 16)}, r"out must be \(3, 1, 2, 32\)"),
    "out's dtype": (POOL, {"out": torch.zeros(3, 1, 2, 32).half()}, "in the dtype of v"),
    "a sparse pool": (POOL, {"state_pool": lambda x: x.to_sparse()}, "dense tensor"),
    "device": (POOL, {"state_pool": lambda x: x.to("meta")}, "must be on cpu like q"),
    "lengths": (PACKED, {"cu_seqlens": torch.tensor([0, 2, 1])}, "must rise within 0 .. T=3"),
    "too long": (PACKED, {"cu_seqlens": torch.tensor([0, 2, 4])}, "must rise within 0 .. T=3"),
}  # fmt: skip


@verifying()
def refused(*names: str) -> bool:
    """Each of these is, whatever would compute; by kernels, after a call that was right, too."""
    known: list[Case] = []
    for name in names:
        case, changes, said = BAD[name]
        if interpreted() and case not in known:
            known.append(case)
            with torch.no_grad():
                call(case)
        with torch.no_grad(), pytest.raises(InputError, match=said):
            call(case, **changes)
    return True


@verifying()
def refused_by_plans() -> bool:
    """What only kernels cannot do: write where elements lie apart; read float64."""
    pool = torch.zeros(5, 2, 32, 33)[..., :32]
    with pytest.raises(InputError, match="state_pool is written in place: heads, rows and columns"):
        plan(Case(), state_pool=pool)
    with pytest.raises(InputError, match="slots must not overlap"):
        plan(Case(), state_pool=torch.zeros(1, 2, 32, 32).expand(5, 2, 32, 32))
    for out in (torch.zeros(3, 2, 2, 40)[..., :32], torch.zeros(1, 2, 2, 32).expand(3, 2, 2, 32)):
        with pytest.raises(InputError, match="out is written in place"):
            plan(Case(T=2), out=out)
    given = draw(Case(states="none"), "cpu").inputs
    wide = {name: x.double() for name, x in given.items()}
    with pytest.raises(InputError, match="q must be float32 or narrower"):
        plan(Case(states="none"), **wide)
    with pytest.raises(InputError, match="state_pool must be float32 or narrower"):
        plan(Case(states="slots"), state_pool=torch.zeros(3, 2, 32, 32).double())
    return True


def refused_where_not_verified() -> bool:
    said = r"fused_recurrent_gdn2's kernels .* not verified"
    with torch.no_grad(), pytest.raises(UnsupportedError, match=said):
        case = Case(K=72, V=40, states="none")
        public_op(case.op)(**draw(case, "cpu").inputs)
    return True
