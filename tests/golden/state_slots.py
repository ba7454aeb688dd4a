"""States of sequences out of slots of a pool, before the stages of a forward, and back after them.

`launch` reads the state that each sequence begins with; `put_back` writes what it ended with to its
slot, in place, and zeros in `o` for what is padding. An index below 0, equal to null_slot or past
the pool's end names no slot: that sequence is padding, begins with zeros, and writes no slot. One
without tokens leaves its slot alone.

    state_pool         [slots, HV, ...]   fp32 or bf16; each slot's dims follow each other
    ssm_state_indices  [N]                int32 or int64: slots of the sequences
    has_initial_state  [N]                whether to begin with what lies there, or with zeros
    cu_seqlens         [N+1] int32        first token of each sequence
    checkpoint_indices [N, NC]            slots of the state after each `every` tokens
    checkpoint_slots   [N, NC] int32      the same, -1 where there is none, and of padding
    o                  [B, T, HV, V]      output
    initial_state      [N, HV, ...] fp32  what sequences begin with
    final_state        [N, HV, ...] fp32  and end with

The state after the last token is a checkpoint, too, where the length is a multiple of `every`: the
scan keeps those before a token alone.

Problem: gdn2 K=64 V=32 indices, flags, checkpoints, packed

Template digest 28c3345c48592e7a
"""

import triton
import triton.language as tl


K, V = 64, 32
BE = 2048  # elements of a state that a program takes
N_E = (K * V + BE - 1) // BE
BV = 32  # at least all values


@triton.jit(
    do_not_specialize=["HV", "slots", "slot_stride", "null_slot", "NC", "index_row"],
    do_not_specialize_on_alignment=["ssm_state_indices", "has_initial_state", "checkpoint_indices"],
)
def read_kernel(
    state_pool,
    ssm_state_indices,
    has_initial_state,
    checkpoint_indices,
    checkpoint_slots,
    initial_state,
    HV,
    slots,
    slot_stride,
    null_slot,
    NC,
    index_row,
    K: tl.constexpr,
    V: tl.constexpr,
    BE: tl.constexpr,
    N_E: tl.constexpr,
):
    i_e = tl.program_id(0) % N_E
    i_nh = tl.program_id(0) // N_E
    i_n, i_h = i_nh // HV, i_nh % HV
    o_e = i_e * BE + tl.arange(0, BE)
    i_slot = tl.load(ssm_state_indices + i_n).to(tl.int64)
    named = (i_slot >= 0) & (i_slot < slots) & (i_slot != null_slot)

    if (i_h == 0) & (i_e == 0):
        for i_k in range(NC):
            i_kept = tl.load(checkpoint_indices + i_n.to(tl.int64) * index_row + i_k).to(tl.int64)
            kept = named & (i_kept >= 0) & (i_kept < slots) & (i_kept != null_slot)
            i_kept = tl.where(kept, i_kept, -1).to(tl.int32)
            tl.store(checkpoint_slots + i_n.to(tl.int64) * NC + i_k, i_kept)
    named = named & (tl.load(has_initial_state + i_n) != 0)
    p_slot = state_pool + i_slot * slot_stride * 8 + i_h * (K * V)
    b_S = tl.load(p_slot + o_e, mask=o_e < tl.where(named, K * V, 0), other=0.0).to(tl.float32)
    tl.store(initial_state + i_nh.to(tl.int64) * (K * V) + o_e, b_S, mask=o_e < K * V)


@triton.jit(
    do_not_specialize=["HV", "T", "slots", "slot_stride", "null_slot", "NC", "every"],
    do_not_specialize_on_alignment=["ssm_state_indices"],
)
def put_back_kernel(
    state_pool,
    ssm_state_indices,
    cu_seqlens,
    checkpoint_slots,
    final_state,
    o,
    HV,
    T,
    slots,
    slot_stride,
    null_slot,
    NC,
    every,
    K: tl.constexpr,
    V: tl.constexpr,
    BE: tl.constexpr,
    BV: tl.constexpr,
    N_E: tl.constexpr,
):
    i_e = tl.program_id(0) % N_E
    i_nh = tl.program_id(0) // N_E
    i_n, i_h = i_nh // HV, i_nh % HV
    o_e = i_e * BE + tl.arange(0, BE)
    i_slot = tl.load(ssm_state_indices + i_n).to(tl.int64)
    named = (i_slot >= 0) & (i_slot < slots) & (i_slot != null_slot)

    i_first = tl.load(cu_seqlens + i_n).to(tl.int64)
    n_tokens = tl.load(cu_seqlens + i_n + 1) - i_first.to(tl.int32)
    if named:
        m_e = o_e < tl.where(n_tokens > 0, K * V, 0)
        b_S = tl.load(final_state + i_nh.to(tl.int64) * (K * V) + o_e, mask=m_e, other=0.0)
        p_slot = state_pool + i_slot * slot_stride * 8 + i_h * (K * V)
        tl.store(p_slot + o_e, b_S, mask=m_e)
        i_k = n_tokens // every - 1
        whole = (n_tokens % every == 0) & (i_k >= 0) & (i_k < NC)
        p_kept = checkpoint_slots + i_n.to(tl.int64) * NC + i_k
        i_kept = tl.load(p_kept, mask=whole, other=-1).to(tl.int64)
        p_slot = state_pool + i_kept * slot_stride * 8 + i_h * (K * V)
        tl.store(p_slot + o_e, b_S, mask=o_e < tl.where(i_kept >= 0, K * V, 0))
    else:
        o_v = tl.arange(0, BV)
        for i_t in range(i_e, n_tokens, N_E):
            p_o = o + ((i_first + i_t) * HV + i_h) * V
            tl.store(p_o + o_v, tl.zeros([BV], o.dtype.element_ty), mask=o_v < V)


def launch(
    state_pool, ssm_state_indices, has_initial_state, checkpoint_indices, checkpoint_slots,
    initial_state, *, n_sequences, HV, slots, slot_stride, null_slot, NC, index_row
):
    """Read what sequences begin with."""
    read_kernel[(n_sequences * HV * N_E,)](
        state_pool, ssm_state_indices, has_initial_state, checkpoint_indices, checkpoint_slots,
        initial_state, HV, slots, slot_stride, null_slot, NC, index_row,
        K=K, V=V, BE=BE, N_E=N_E, num_warps=4,
    )  # fmt: skip


def put_back(
    state_pool, ssm_state_indices, cu_seqlens, checkpoint_slots, final_state, o, *, n_sequences,
    HV, T, slots, slot_stride, null_slot, NC, every
):
    """Write what sequences ended with, and zeros for padding."""
    put_back_kernel[(n_sequences * HV * N_E,)](
        state_pool, ssm_state_indices, cu_seqlens, checkpoint_slots, final_state, o, HV, T,
        slots, slot_stride, null_slot, NC, every,
        K=K, V=V, BE=BE, BV=BV, N_E=N_E, num_warps=4,
    )  # fmt: skip
