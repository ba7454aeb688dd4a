"""What each operand of a stage is, in a line, for the glossaries in the docstrings of kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gdn2gen.family.problem import Problem
from gdn2gen.family.recurrence import Recurrence
from gdn2gen.family.registry import recurrence_named

WORDS: Final[Mapping[str, str]] = {
    # the caller's
    "q": "queries",
    "k": "keys",
    "v": "values",
    "g": "log decay",
    "b": "erase gate",
    "w": "write gate",
    "beta": "factor of what a token erases and writes",
    "A_log": "log of the decay's rate",
    "dt_bias": "added to g before its activation",
    "dt": "step: what a token decays by and writes",
    "rate": "decay of a step of 1",
    "D": "factor of a token's own value, added to o",
    "z": "output gate, before silu",
    "initial_state": "state before the first token",
    "final_state": "state after the last token",
    "o": "output",
    # of states in a pool
    "state_pool": "states, read and written in place",
    "ssm_state_indices": "slots of each sequence",
    "num_accepted_tokens": "tokens accepted of those guessed",
    "checkpoint_slots": "slots of each sequence for states on the way",
    "checkpoints": "states on the way, each in its slot",
    # of a packed batch
    "cu_seqlens": "first token of each sequence",
    "chunk_offsets": "first chunk of each sequence",
    "chunk_table": "first token and number of tokens of each chunk",
    # of a layer's parts
    "x": "tokens",
    "weight": "factor of each channel, or of its taps, the oldest first",
    "bias": "added before SiLU",
    "initial_tail": "the last inputs before x",
    "final_tail": "the last inputs",
    "tail": "the last inputs, before and after x: in place",
    "place": "tokens of its sequence before each token",
    "sequence": "number of the sequence that each token is of",
    "gate": "output gate, before its activation",
    "y": "output",
    "dy": "gradient of y",
    "dx": "gradient of x",
    "dgate": "gradient of gate",
    "dweight": "gradient of weight",
    "dbias": "gradient of bias",
    "added": "what a block adds to x",
    "total": "x + added",
    "dtotal": "gradient of the stream after it",
    "dadded": "gradient of added",
    "low": "what the gate is projected from",
    "proj": "projection to the gate, of all heads",
    "gate_bias": "added to the gate",
    "up": "what the activated gate multiplies",
    "dup": "gradient of up",
    "seen": "tokens before, of each sequence: in place",
    "cos": "cosines of the angles that q and k are turned by",
    "sin": "their sines",
    "k_ring": "keys of the last tokens, turned, p's in row p % W: in place",
    "v_ring": "their values: in place",
    "part_o": "scratch: sums of runs of rows",
    "part_m": "scratch: the largest score of each",
    "part_l": "scratch: what each adds up to",
    "partial": "scratch: sums of programs for gradients of parameters",
    # around Mamba-3's scan
    "Q": "queries, without biases",
    "K": "keys, without biases",
    "V": "values",
    "ADT": "log decay",
    "DT": "steps",
    "Trap": "trapezoidal factor, before its sigmoid",
    "Q_bias": "added to queries",
    "K_bias": "added to keys",
    "Angles": "rates of rotation, before tanh",
    "Z": "output gate, before SiLU",
    "angle_state": "Theta before the first token, radians",
    "ssm_state": "state before the token",
    "k_state": "key of the token before, biased and rotated",
    "v_state": "value of the token before",
    "last_ssm": "state after the token",
    "last_k": "key of the token, biased and rotated",
    "last_angle": "Theta after the last token, radians",
    "tiles": "sequence and first token of each tile, tokens before it and from it on",
    "tile_starts": "first tile of each sequence",
    "turns": "Theta before each tile, in units of 2^-32 turns",
    "theta": "Theta of each token within its tile, in units of 2^-32 turns",
    "initial_ssm": "state before the first token",
    "final_ssm": "state after the last token",
    "dfinal_ssm": "gradient of final_ssm",
    "dinitial_ssm": "gradient of initial_ssm",
    "decay": "log decay of each token",
    "own": "factor of a token's own value in its output",
    "first": "what first tokens see of the state before them",
    "out": "output",
    "ddecay": "gradient of decay",
    "down": "gradient of the factor of a token's own value",
    "dlast_angle": "gradient of last_angle",
    "dQ_part": "gradient of Q from some heads of a group",
    "dK_part": "gradient of K from some heads of a group",
    "ungated": "output before its gate, y",
    "dlast_turn": "what a turn of the last state's keys changes",
    "dQ": "gradient of Q",
    "dK": "gradient of K",
    "dQ_head": "scratch: gradient of each head's queries, biased and turned",
    "dK_head": "scratch: gradient of each head's keys, biased and turned",
    "dQ_bias_part": "gradient of Q_bias from each tile",
    "dK_bias_part": "gradient of K_bias from each tile",
    "dADT": "gradient of ADT",
    "dDT": "gradient of DT",
    "dTrap": "gradient of Trap",
    "dAngles": "gradient of Angles",
    "dangle_state": "gradient of angle_state",
    "within": "scratch: log2 of the decay from the chunk's start to each token",
    "tail_decay": "scratch: decay from each token to the chunk's end",
    "weight_s": "scratch: s",
    "own_dt": "scratch: lambda dt",
    "rates": "scratch: half of tanh of each angle, of the head that all share or of each",
    "dweight_s": "scratch: gradient of s",
    "dread": "scratch: gradient of what pairs leave of each token that reads",
    "read_q": "scratch: q's product with its gradient by the state, before decay",
    "written_k": "scratch: k's product with its gradient by the state, before decay",
    "kept_state": "scratch: <S, dS> of each tile",
    "sums": "scratch: rows of five sums of each token, by which its numbers have their gradients",
    "kept_part": "scratch: <S, dS> of each tile and value",
    "down_dt": "scratch: gradient of lambda dt",
    "dtheta": "scratch: gradient of each token's Theta",
    "dtheta_k": "scratch: what keys have of it",
    "dtheta_sums": "scratch: sums of it over tiles, then over what comes after each",
    "dtheta_part": "scratch: sums of it after each tile, by quarters of the values",
    "dout": "gradient of out",
    "dV": "gradient of V, but for the scan's part",
    "dZ": "gradient of Z",
    "dfirst": "gradient of first",
    # of a chunk
    "q_rstd": "1 / norm of q",
    "k_rstd": "1 / norm of k",
    "k_beta": "beta, after its activation",
    "A": "inverse of I + T, lower triangle",
    "Aqk": "decayed scores, lower triangle",
    "Qg": "queries, scaled and decayed from the chunk's start",
    "Y": "erasing keys through the inverse, -A E",
    "Ktail": "keys, decayed to the chunk's end",
    "q_head": "scale / norm of q, decayed from the chunk's start",
    "k_head": "1 / norm of k, decayed from the chunk's start",
    "k_tail": "1 / norm of k, decayed to the chunk's end",
    "log_decay": "decay of each token, log2",
    "gamma_C": "decay of the whole chunk",
    "gamma_B": "scratch: decay of each sub-block",
    "G": "decay since the chunk's start, log2",
    "h": "state at the chunk's start, transposed",
    "R": "what each token adds to the state",
    "scores": "<q_i, k_j> of a group, as they are",
    "step": "step of each token, after its activation",
    # of a segment
    "S_seg": "state at the segment's start, transposed",
    "M_seg": "scratch: transition of all segments but first and last",
    "dS_seg": "scratch: gradient of the state at the segment's end",
    # gradients
    "do": "gradient of o",
    "dht": "gradient of final_state",
    "dh0": "gradient of initial_state",
    "dh": "gradient of the state at the chunk's end, transposed",
    "dX": "gradient of X = w v - E S, where R = A X",
    "dX_rest": "what rounding dX to 16 bits left",
    "dT": "gradient of T, strict lower triangle",
    "dAqk": "gradient of Aqk, strict lower triangle",
    "dAqk_diagonal": "gradient of Aqk's diagonal: <do, R>",
    "z_dot": "<dX, w v>, by 16 values",
    "q_dot": "<q, dq> of the normalised q",
    "k_dot": "<k, dk> of the normalised k",
    "dv": "gradient of v",
    "dw": "gradient of w",
    "dq": "gradient of q, per value head",
    "dk": "gradient of k, per value head",
    "dg": "gradient of g, per value head",
    "db": "gradient of b, per value head",
    "beta_dot": "<R, dX>, which is k_beta times its gradient",
    "dbeta_part": "gradient of k_beta: sums over a slice of channels",
    "dbeta": "gradient of beta",
    "dg_part": "gradient of the log decay: sums over a slice of channels",
    "dA_log": "gradient of A_log: sums over the chunk's tokens",
    "ddt_bias": "gradient of dt_bias: sums over the chunk's tokens",
    "dz": "gradient of z",
    "decay_part": "gradient of the log decay: sums over a slice of channels",
    "step_part": "gradient of what a token writes, by its step: the same",
    "decay_pairs": "scratch: gradient of the log decay, of pairs",
    "step_pairs": "scratch: the same of what a token writes, by its step",
    "head_decay": "scratch: decay from the chunk's start to a token",
    "tail_step": "scratch: step of a token, decayed to the chunk's end",
    "taken": "scratch: <q, dY S^T>: sums over a slice of channels",
    "written": "scratch: <k, v dS^T>: the same",
    "kept": "scratch: <S, dS>: the same",
    "dscores": "scratch: gradient of scores, transposed; sums over heads",
    "ddt": "gradient of dt",
    "drate": "gradient of rate: sums over the chunk's tokens",
    "dD": "gradient of D: sums over the chunk's tokens",
}


# The same where the factors are tied.
_TIED: Final[Mapping[str, str]] = {
    "Ktail": "beta times the keys, decayed to the chunk's end",
    "k_tail": "beta / norm of k, decayed to the chunk's end",
    "R": "u: a token adds (beta k) u^T to the state",
    "dX": "gradient of X = v - E S, where R = A X",
    "z_dot": "<dX, v>, by 16 values",
}


# The same where a state is kept of every few chunks.
_OF_BLOCKS: Final[Mapping[str, str]] = {
    "h": "state at the block's start, transposed",
    "dh": "gradient of the state at the block's end, transposed",
}


# The same where transitions of segments are kept for the backward.
_OF_TRANSITIONS: Final[Mapping[str, str]] = {
    "M_seg": "transitions of segments, transposed",
}


# The same where the decay is a rate times what is written.
_STEPPED: Final[Mapping[str, str]] = {
    "dy": "gradient of o before its gate",
    "dt_bias": "added to dt before its activation",
    "dq": "gradient of q: sums over heads of a group",
    "dk": "gradient of k: sums over heads of a group",
}


# What `_of_heads` makes its words of: factors, and what they decay by.
_OF_HEADS: Final[Mapping[str, tuple[str, str]]] = {
    "q_head": ("scale", "from the chunk's start"),
    "k_head": ("1", "from the chunk's start"),
    "k_tail": ("1", "to the chunk's end"),
}


def _of_heads(name: str, problem: Problem, member: Recurrence) -> str:
    """Of the numbers a token that scans multiply q and k by: without the norm, or without decay."""
    factor, reach = _OF_HEADS[name]
    if member.tied and name == "k_tail":
        factor = "beta"
    words = f"{factor} / norm of {name[0]}" if problem.l2norm else factor
    if member.decay is None:
        return words
    return f"decay {reach}" if words == "1" else f"{words}, decayed {reach}"


def what(name: str, stage: str, problem: Problem) -> str:
    """What the operand of this name is in a stage's kernels of `problem`."""
    member = recurrence_named(problem.op)
    if name in _STEPPED and member.stepped:
        return _STEPPED[name]
    if name in _OF_BLOCKS and "blocks" in stage:
        return _OF_BLOCKS[name]
    if name in _OF_TRANSITIONS and "transitions" in stage:
        return _OF_TRANSITIONS[name]
    if name in _OF_HEADS and (not problem.l2norm or member.decay is None):
        return _of_heads(name, problem, member)
    if name in _TIED and member.tied:
        return _TIED[name]
    if name == "Aqk" and member.decay is None:
        return "scores, lower triangle"
    if name == "g" and problem.gate != "none":
        return "pre-activation of the log decay"
    if name in ("q", "k") and problem.l2norm:
        return f"{WORDS[name]}; normalised in the kernel"
    if (name, stage, problem.gate_dtype) == ("G", "grad_key", "fp32"):
        return f"{WORDS[name]}; dg takes its place"
    return WORDS[name]
