"""Whole rendered outputs, kept under tests/golden; `pytest --update-golden` writes them anew."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import jinja2
import pytest
from jinja2 import meta, nodes
from source_tree import ROOT
from tilelang_configs import tilelang_by_chunk, tilelang_config

from gdn2gen.base.files import replace_file
from gdn2gen.base.paths import templates_dir
from gdn2gen.codegen.context import context
from gdn2gen.codegen.package import package_source
from gdn2gen.codegen.render import (
    SLOTS_TEMPLATE,
    TABLES_TEMPLATE,
    render,
    render_slots,
    render_tables,
    template_name,
)
from gdn2gen.family.compiled import Compiled
from gdn2gen.family.decoding import DecodingProblem
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.parts import (
    ConvolutionProblem,
    DecayGateProblem,
    NormProblem,
    ProjectedNormProblem,
    RotaryProblem,
    SigmoidProblem,
    StreamNormProblem,
    SwigluProblem,
    WindowProblem,
)
from gdn2gen.family.prefill import PrefillProblem
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config, default_config, default_of
from gdn2gen.kernels.languages import LANGUAGES
from gdn2gen.kernels.limits import Knob, Place
from gdn2gen.kernels.parts import PartStage
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.stage import Form
from gdn2gen.kernels.stages import EVERY_STAGE, STAGES
from gdn2gen.store.dispatch import Found, generate_command

GOLDEN = ROOT / "tests/golden"
_PACKED: Final = Problem(
    K=64, V=32, dtype="fp16", gate="softplus", has_A_log=True, has_dt_bias=True, varlen=True
)
_STATES: Final = Problem(K=64, V=128, dtype="fp32", initial_state=True, final_state=True)


# what the dyadic placements of prepare are for
_ONE_WARP: Final[dict[str, Knob]] = {"BK": 32, "num_warps": 1}


def _prepare() -> str:
    problem = Problem()
    config = default_config("prepare", problem, BT=64).replace(decay="tree", **_ONE_WARP)
    return render(problem, "prepare", config).source


def _anchored(stage: str) -> str:
    problem = replace(_PACKED, K=128, dtype="bf16")
    return render(problem, stage, default_config(stage, problem)).source


# whose chunks of 32 tokens stay within one frame
_BOUNDED: Final = Problem(
    dtype="bf16", gate="sigmoid", has_A_log=True, has_dt_bias=True, varlen=True, bound=2
)


def _prepare_bounded() -> str:
    config = default_config("prepare", _BOUNDED).replace(decay="bounded")
    return render(_BOUNDED, "prepare", config).source


def _prepare_bounded_tilelang() -> str:
    problem = replace(_BOUNDED, varlen=False)
    config = tilelang_by_chunk("prepare", problem).replace(decay="bounded")
    return render(problem, "prepare", config).source


def _grad_key() -> str:
    config = default_config("grad_key", _PACKED, BT=32).replace(maxnreg=128)
    return render(_PACKED, "grad_key", config).source


def _prepare_sigmoid_log() -> str:
    problem = Problem(K=64, V=64, gate="sigmoid", gate_dtype="bf16", l2norm=False)
    config = default_config("prepare", problem, BT=16).replace(decay="log", **_ONE_WARP)
    return render(problem, "prepare", config).source


def _scan() -> str:
    return render(_STATES, "scan", default_config("scan", _STATES, BT=16)).source


def _reverse_scan_tilelang() -> str:
    problem = Problem(varlen=True, initial_state=True, final_state=True)
    config = default_config("reverse_scan", problem).replace(language="tilelang")
    return render(problem, "reverse_scan", config).source


def _prepare_tilelang() -> str:
    problem = Problem()
    return render(problem, "prepare", tilelang_by_chunk("prepare", problem)).source


def _past_head_dims_tilelang(stage: str) -> str:
    """In tiles that reach past both head dims."""
    gates = {"gate": "softplus", "has_A_log": True, "has_dt_bias": True}
    problem = Problem(K=72, V=40, initial_state=True, final_state=True, **gates)  # type: ignore[arg-type]
    return render(problem, stage, tilelang_config(stage, problem)).source


def _scan_tilelang() -> str:
    config = default_config("scan", Problem()).replace(language="tilelang")
    return render(Problem(), "scan", config).source


def _prepare_at_once_tilelang() -> str:
    config = tilelang_by_chunk("prepare", Problem()).replace(solve="ieee")
    return render(Problem(), "prepare", config).source


def _reprepare_tilelang() -> str:
    return render(Problem(), "reprepare", tilelang_by_chunk("reprepare", Problem())).source


def _grad_value_tilelang() -> str:
    return render(Problem(), "grad_value", tilelang_by_chunk("grad_value", Problem())).source


def _grad_key_tilelang() -> str:
    problem = replace(_PACKED, K=128, dtype="bf16")
    return render(problem, "grad_key", tilelang_by_chunk("grad_key", problem)).source


# beta before its sigmoid, in (0, 2)
_TIED: Final = Problem(op="kda", beta_sigmoid=True, neg_eigval=True)


def _tied(stage: str) -> str:
    problem = replace(_TIED, varlen=True)
    return render(problem, stage, default_config(stage, problem)).source


# A decay of one number a head, outside of products.
_OUTSIDE: Final = Problem(
    op="gated_delta_rule", gate="softplus", has_A_log=True, has_dt_bias=True, varlen=True
)


def _outside(stage: str, **knobs: str | int) -> str:
    return render(_OUTSIDE, stage, default_config(stage, _OUTSIDE).replace(**(knobs or {}))).source


def _plain(op: str, stage: str) -> str:
    """Of a member that lacks a gate, a factor or a decay, all at its defaults."""
    problem = Problem(op)
    return render(problem, stage, default_config(stage, problem)).source


# Heads that share the scores of a group, of a layer with a skip and a gate.
_GROUPS: Final = Problem(
    "mamba2", V=64, gate="softplus", gate_dtype="bf16", has_rate=True, has_dt_bias=True, has_D=True,
    has_z=True,
)  # fmt: skip


def _groups(stage: str, knobs: dict[str, Knob] | None = None, **changes: bool) -> str:
    problem = replace(_GROUPS, **changes)
    return render(problem, stage, default_config(stage, problem).replace(**(knobs or {}))).source


def _groups_tilelang(stage: str, **changes: bool) -> str:
    problem = replace(_GROUPS, **changes)
    form = next(x for x in STAGES[stage].forms if x.language == "tilelang")
    return render(problem, stage, default_of(stage, form, Place(problem, 64, "sm_90"))).source


def _tied_tilelang(stage: str) -> str:
    return render(_TIED, stage, tilelang_by_chunk(stage, _TIED)).source


def _member_tilelang(problem: Problem, stage: str, **knobs: str | int) -> str:
    """Of a member whose decay is outside of products, or that erases nothing."""
    return render(problem, stage, tilelang_config(stage, problem).replace(**(knobs or {}))).source


# tokens guessed ahead, in slots of a pool; and one token of views of a packed projection
_GUESSED: Final = DecodingProblem(
    gate="softplus", has_A_log=True, has_dt_bias=True, varlen=True, state_v_first=True,
    pool=True, indexed=True, speculative=True, accepted=True,
)  # fmt: skip
_ONE_TOKEN: Final = DecodingProblem(
    op="kda", K=80, V=48, beta_sigmoid=True, state_bf16=True, pool=True, indexed=True,
    one_token=True, strided=True,
)  # fmt: skip


# and one token of a layer of Mamba-2
_STEP: Final = DecodingProblem(
    op="mamba2", V=64, gate="softplus", gate_dtype="bf16", has_rate=True, has_dt_bias=True,
    has_D=True, has_z=True, state_v_first=True, pool=True, indexed=True, one_token=True,
    strided=True, tied_D=True,
)  # fmt: skip


def _recurrent(problem: DecodingProblem, **knobs: Knob) -> str:
    config = default_config("recurrent", problem).replace(**knobs)
    return render(problem, "recurrent", config).source


def _part(stage: str, problem: Compiled, **knobs: int) -> str:
    return render(problem, stage, default_config(stage, problem).replace(**(knobs or {}))).source


# q, k and v of packed sequences, some of which go on
_PACKED_QKV: Final = ConvolutionProblem(packed=True, initial_tail=True, final_tail=True)
_WITH_BIAS: Final = ConvolutionProblem(width=3, bias=True, tensors=1, weight_dtype="fp32")
_OF_96: Final = NormProblem(size=96, activation="silu")
_MAMBA3: Final = Mamba3Problem(skip=True, gate=True, carried=True, packed=True)


def _parallel(stage: str) -> str:
    config = default_config(stage, _STATES, BT=16).replace(segments="parallel")
    return render(_STATES, stage, config).source


def _parallel_tilelang(stage: str) -> str:
    config = default_config(stage, Problem()).replace(segments="parallel", language="tilelang")
    return render(Problem(), stage, config).source


def _scan_states_tilelang() -> str:
    config = default_config("scan_states", Problem()).replace(language="tilelang")
    return render(Problem(), "scan_states", config).source


def _package_of(recipe: Recipe) -> str:
    return package_source(recipe, generate_command(Found(recipe, "default", "")))


def _package() -> str:
    return _package_of(Recipe.default(_STATES))


def _package_packed() -> str:
    return _package_of(Recipe.default(_PACKED, "fast"))


def _scan_checkpoints() -> str:
    """Of channels in two slices, into slots at any distance."""
    problem = PrefillProblem.of(replace(_PACKED, K=96), "bf16", odd_slots=True)
    return render(problem, "scan", default_config("scan", problem)).source


def _scan_group_checkpoints() -> str:
    problem = PrefillProblem.of(replace(_GROUPS, varlen=True), "fp32", odd_slots=False)
    return render(problem, "scan_group", default_config("scan_group", problem)).source


def _state_slots() -> str:
    given = {"indexed": True, "flagged": True, "checkpoints": True, "odd_slots": False}
    return render_slots(_PACKED, **given).source


def _blocks(stage: str, segments: str = "serial", **changes: Any) -> str:
    """Of states that are kept of every few chunks."""
    problem = replace(Problem(initial_state=True, final_state=True), **changes)
    config = default_config(stage, problem)
    if "segments" in config:
        config = config.replace(segments=segments)
    return render(problem, stage, config).source


def _reach(stage: str, language: str, **knobs: Knob) -> str:
    """In segments of which what has decayed is left out, and with products of cut halves."""
    problem = Problem("gated_delta_rule", initial_state=True, final_state=True)
    config = default_config(stage, problem).replace(language=language, segments="parallel", **knobs)
    return render(problem, stage, config.replace(reach=64, merge="cut")).source


def _forward(problem: Problem, stage: str = "forward") -> str:
    return render(problem, stage, default_config(stage, problem)).source


OUTPUTS: Final = {
    "forward.py": partial(_forward, Problem(initial_state=True, final_state=True)),
    "forward_64.py": partial(_forward, Problem(K=64, V=64, initial_state=True, final_state=True)),
    "forward_64_states.py": partial(
        _forward, Problem(K=64, V=64, initial_state=True, final_state=True), "forward_blocks1"
    ),
    "forward_96_states.py": partial(_forward, Problem(K=96, V=96), "forward_blocks2"),
    "forward_128x64.py": partial(_forward, Problem(V=64, initial_state=True, final_state=True)),
    "forward_48x104_states.py": partial(
        _forward, Problem("kda", K=48, V=104, final_state=True), "forward_blocks1"
    ),
    "forward_64_kda.py": partial(_forward, Problem("kda", K=64, V=64)),
    "forward_104.py": partial(
        _forward, Problem(K=104, V=112, initial_state=True, final_state=True)
    ),
    "forward_outside.py": partial(
        _forward,
        Problem("gated_delta_rule", initial_state=True, final_state=True),
        "forward_outside",
    ),
    "forward_outside_states.py": partial(
        _forward, Problem("gated_delta_rule", final_state=True), "forward_outside_blocks2"
    ),
    "forward_outside_64.py": partial(
        _forward,
        Problem("gated_delta_rule", K=64, V=64, initial_state=True, final_state=True),
        "forward_outside",
    ),
    "forward_outside_64_states.py": partial(
        _forward, Problem("delta_rule", K=56, V=48, l2norm=False), "forward_outside_blocks2"
    ),
    "forward_outside_undecayed.py": partial(
        _forward, Problem("delta_rule", K=104, V=112, l2norm=False), "forward_outside"
    ),
    "forward_kda.py": partial(_forward, Problem("kda", beta_sigmoid=True, neg_eigval=True)),
    "prepare.py": _prepare,
    "grad_key_softplus_packed.py": _grad_key,
    "prepare_anchored_packed.py": partial(_anchored, "prepare"),
    "grad_key_anchored_packed.py": partial(_anchored, "grad_key"),
    "prepare_bounded_packed.py": _prepare_bounded,
    "prepare_bounded_tilelang.py": _prepare_bounded_tilelang,
    "prepare_sigmoid_log.py": _prepare_sigmoid_log,
    "scan_states.py": _scan,
    "scan_parallel_states.py": partial(_parallel, "scan"),
    "reverse_scan_parallel_states.py": partial(_parallel, "reverse_scan"),
    "scan_keeping_states_tilelang.py": _scan_states_tilelang,
    "scan_parallel_tilelang.py": partial(_parallel_tilelang, "scan"),
    "reverse_scan_parallel_tilelang.py": partial(_parallel_tilelang, "reverse_scan"),
    "reverse_scan_tilelang.py": _reverse_scan_tilelang,
    "scan_tilelang.py": _scan_tilelang,
    "prepare_tilelang.py": _prepare_tilelang,
    "prepare_past_head_dims_tilelang.py": partial(_past_head_dims_tilelang, "prepare"),
    "scan_past_head_dims_tilelang.py": partial(_past_head_dims_tilelang, "scan"),
    "grad_value_tilelang.py": _grad_value_tilelang,
    "reprepare_tilelang.py": _reprepare_tilelang,
    "prepare_at_once_tilelang.py": _prepare_at_once_tilelang,
    "grad_key_tilelang_packed.py": _grad_key_tilelang,
    "prepare_kda_packed.py": partial(_tied, "prepare"),
    "grad_key_kda_packed.py": partial(_tied, "grad_key"),
    "prepare_kda_tilelang.py": partial(_tied_tilelang, "prepare"),
    "grad_value_kda_tilelang.py": partial(_tied_tilelang, "grad_value"),
    "grad_key_kda_tilelang.py": partial(_tied_tilelang, "grad_key"),
    "prepare_outside_packed.py": partial(_outside, "prepare"),
    "scan_outside_packed.py": partial(_outside, "scan"),
    "reverse_scan_outside_packed.py": partial(_outside, "reverse_scan"),
    "grad_key_outside_packed.py": partial(_outside, "grad_key"),
    "prepare_delta_rule.py": partial(_plain, "delta_rule", "prepare"),
    "reverse_scan_delta_rule.py": partial(_plain, "delta_rule", "reverse_scan"),
    "prepare_gla.py": partial(_plain, "gla", "prepare"),
    "scan_gla.py": partial(_plain, "gla", "scan"),
    "grad_key_gla.py": partial(_plain, "gla", "grad_key"),
    "scan_outside_tilelang_packed.py": partial(_member_tilelang, _OUTSIDE, "scan"),
    "reverse_scan_outside_tilelang_packed.py": partial(_member_tilelang, _OUTSIDE, "reverse_scan"),
    "prepare_outside_tilelang_packed.py": partial(_member_tilelang, _OUTSIDE, "prepare"),
    "grad_key_outside_tilelang_packed.py": partial(_member_tilelang, _OUTSIDE, "grad_key"),
    "scan_states_delta_rule_tilelang.py": partial(
        _member_tilelang, Problem("delta_rule", dtype="fp16"), "scan_states"
    ),
    "reverse_scan_simple_gla_tilelang.py": partial(
        _member_tilelang, Problem("simple_gla"), "reverse_scan", segments="parallel"
    ),
    "grad_key_simple_gla_tilelang.py": partial(_member_tilelang, Problem("simple_gla"), "grad_key"),
    "prepare_simple_gla_tilelang.py": partial(_member_tilelang, Problem("simple_gla"), "prepare"),
    "prepare_gla_tilelang.py": partial(_member_tilelang, Problem("gla"), "prepare"),
    "grad_key_gla_tilelang.py": partial(_member_tilelang, Problem("gla", varlen=True), "grad_key"),
    "prepare_gla_centred.py": partial(_member_tilelang, Problem("gla"), "prepare", decay="centred"),
    "grad_key_gla_centred.py": partial(
        _member_tilelang, Problem("gla", varlen=True), "grad_key", decay="centred"
    ),
    "prepare_centred_tilelang.py": partial(_member_tilelang, Problem(), "prepare", decay="centred"),
    "grad_key_kda_centred_packed.py": partial(
        _member_tilelang,
        Problem("kda", K=64, V=64, varlen=True, gate="softplus", has_A_log=True, has_dt_bias=True),
        "grad_key",
        decay="centred",
    ),
    "reverse_scan_gla_tilelang.py": partial(_member_tilelang, Problem("gla"), "reverse_scan"),
    "reverse_scan_simple_gla.py": partial(_plain, "simple_gla", "reverse_scan"),
    "grad_key_simple_gla.py": partial(_plain, "simple_gla", "grad_key"),
    "reprepare_factors.py": partial(_blocks, "reprepare_factors"),
    "scan_blocks_parallel.py": partial(_blocks, "scan_blocks4", segments="parallel"),
    "rescan_blocks_packed.py": partial(_blocks, "rescan_blocks2", varlen=True),
    "reverse_scan_blocks_packed.py": partial(_blocks, "reverse_scan_blocks2", varlen=True),
    "reverse_scan_blocks_parallel.py": partial(
        _blocks, "reverse_scan_blocks1", segments="parallel"
    ),
    "grad_blocks_packed.py": partial(_blocks, "grad_blocks4", varlen=True),
    "grad_blocks_fp16.py": partial(_blocks, "grad_blocks1", dtype="fp16", K=64),
    "grad_blocks_kda.py": partial(_blocks, "grad_blocks2", op="kda"),
    "grad_blocks_tilelang.py": partial(_member_tilelang, Problem(), "grad_blocks1"),
    "grad_blocks_kda_tilelang.py": partial(
        _member_tilelang, Problem("kda", K=64, V=64), "grad_blocks1"
    ),
    "reverse_scan_blocks_tilelang.py": partial(
        _member_tilelang, Problem(final_state=True), "reverse_scan_blocks1"
    ),
    "reverse_scan_blocks_kda_tilelang.py": partial(
        _member_tilelang, Problem("kda", K=64, V=64, l2norm=False), "reverse_scan_blocks1"
    ),
    "scan_blocks_tilelang.py": partial(
        _member_tilelang, Problem(initial_state=True), "scan_blocks2"
    ),
    "reverse_scan_blocks2_tilelang.py": partial(
        _member_tilelang, Problem(), "reverse_scan_blocks2"
    ),
    "scan_blocks_parallel_tilelang.py": partial(
        _member_tilelang,
        Problem(initial_state=True, state_v_first=True),
        "scan_blocks4",
        segments="parallel",
    ),
    "reverse_scan_blocks_parallel_tilelang.py": partial(
        _member_tilelang,
        Problem("kda", initial_state=True, final_state=True),
        "reverse_scan_blocks2",
        segments="parallel",
    ),
    "scan_reach.py": partial(_reach, "scan_blocks2", "triton", BV=32),
    "reverse_scan_reach.py": partial(_reach, "reverse_scan", "triton", BV=32),
    "scan_reach_tilelang.py": partial(_reach, "scan", "tilelang", BV=64),
    "reverse_scan_reach_tilelang.py": partial(_reach, "reverse_scan_blocks2", "tilelang", BV=64),
    "rescan_blocks_tilelang.py": partial(_member_tilelang, Problem(), "rescan_blocks2"),
    "reverse_scan_turned.py": partial(
        _blocks, "reverse_scan_blocks2_transitions", "parallel", op="kda", K=64, V=64
    ),
    "reverse_scan_turned_tilelang.py": partial(
        _member_tilelang,
        Problem(initial_state=True, final_state=True),
        "reverse_scan_blocks2_transitions",
        BV=128,
        num_stages=3,
    ),
    "grad_blocks2_tilelang.py": partial(_member_tilelang, Problem(), "grad_blocks2"),
    "rescan_blocks_outside.py": partial(_blocks, "rescan_blocks2", op="delta_rule"),
    "reverse_scan_blocks_outside_packed.py": partial(_outside, "reverse_scan_blocks2"),
    "grad_blocks_outside_packed.py": partial(_outside, "grad_blocks2"),
    "grad_blocks_outside_fp16.py": partial(
        _blocks, "grad_blocks1", op="gated_delta_rule", dtype="fp16", K=160
    ),
    "scan_blocks_outside_tilelang.py": partial(
        _member_tilelang, Problem("gated_delta_rule", initial_state=True), "scan_blocks2"
    ),
    "reverse_scan_blocks_outside_tilelang.py": partial(
        _member_tilelang, Problem("gated_delta_rule", final_state=True), "reverse_scan_blocks2"
    ),
    "grad_blocks_outside_tilelang.py": partial(
        _member_tilelang, Problem("gated_delta_rule"), "grad_blocks2"
    ),
    "grad_blocks_delta_rule_tilelang.py": partial(
        _member_tilelang, Problem("delta_rule", K=64, V=64, l2norm=False), "grad_blocks2"
    ),
    "grad_blocks2_104_tilelang.py": partial(
        _member_tilelang, Problem(K=104, V=112), "grad_blocks2"
    ),
    "package_blocks.py": lambda: _package_of(Recipe.default(_PACKED, "blocks2_states")),
    "prepare_group.py": partial(_groups, "prepare_group"),
    "scan_group.py": partial(_groups, "scan_group"),
    "rescan_group_packed.py": partial(_groups, "rescan_group", varlen=True),
    "reverse_scan_group.py": partial(_groups, "reverse_scan_group", has_z=False),
    "grad_group.py": partial(_groups, "grad_group"),
    "grad_group_inside.py": partial(_groups, "grad_group", {"pairs": "inside"}),
    "rescan_group_inside.py": partial(_groups, "rescan_group", {"gating": "inside"}),
    "scan_group_tilelang.py": partial(_groups_tilelang, "scan_group", initial_state=True),
    "rescan_group_tilelang.py": partial(_groups_tilelang, "rescan_group"),
    "rescan_group_tilelang_packed.py": partial(
        _groups_tilelang, "rescan_group", varlen=True, has_z=False
    ),
    "reverse_scan_group_tilelang.py": partial(
        _groups_tilelang, "reverse_scan_group", varlen=True, final_state=True
    ),
    "grad_group_tilelang.py": partial(_groups_tilelang, "grad_group"),
    "grad_group_tilelang_packed.py": partial(
        _groups_tilelang, "grad_group", varlen=True, has_z=False
    ),
    "chunk_tables_mamba2.py": lambda: render_tables(replace(_GROUPS, varlen=True), 32).source,
    "chunk_tables.py": lambda: render_tables(_PACKED, 32).source,
    "chunk_tables_kda.py": lambda: render_tables(replace(_PACKED, op="kda"), 32).source,
    "scan_checkpoints.py": _scan_checkpoints,
    "scan_group_checkpoints.py": _scan_group_checkpoints,
    "state_slots.py": _state_slots,
    "recurrent_speculative.py": partial(_recurrent, _GUESSED),
    "recurrent_kda_one_token.py": partial(_recurrent, _ONE_TOKEN),
    "recurrent_mamba2_one_token.py": partial(_recurrent, _STEP),
    "recurrent_loads_ahead.py": partial(
        _recurrent, _ONE_TOKEN, tiles=2, loads="ahead", evict="first", maxnreg=128
    ),
    "short_conv_packed.py": partial(_part, "short_conv", _PACKED_QKV, BR=4, ahead=2, early=1),
    "short_conv_backward.py": partial(
        _part, "short_conv_backward", _WITH_BIAS, BR=4, ahead=2, early=1
    ),
    "short_conv_step.py": partial(_part, "short_conv_step", ConvolutionProblem()),
    "stream_norm.py": partial(_part, "stream_norm", StreamNormProblem(weight_dtype="fp32")),
    "stream_norm_backward.py": partial(
        _part, "stream_norm_backward", StreamNormProblem(size=96, added=True), early=1
    ),
    "rotary.py": partial(_part, "rotary", RotaryProblem(), BR=32),
    "window_step.py": partial(_part, "window_step", WindowProblem(), BT=128, BW=64),
    "swiglu.py": partial(_part, "swiglu", SwigluProblem(), BE=1024),
    "projected_norm.py": partial(_part, "projected_norm", ProjectedNormProblem(rank=64, bias=True)),
    "projected_norm_turns.py": partial(
        _part,
        "projected_norm",
        ProjectedNormProblem(activation="silu"),
        turns=4,
        num_stages=2,
    ),
    "sigmoid_backward.py": partial(_part, "sigmoid_backward", SigmoidProblem(), BR=8, BD=256),
    "swiglu_backward.py": partial(_part, "swiglu_backward", SwigluProblem(), BE=1024),
    "gated_norm.py": partial(_part, "gated_norm", NormProblem(), BR=32),
    "gated_norm_backward.py": partial(_part, "gated_norm_backward", _OF_96, BR=16, BT=32),
    "decay_gate.py": partial(_part, "decay_gate", DecayGateProblem()),
    "decay_gate_backward.py": partial(_part, "decay_gate_backward", DecayGateProblem(), ahead=2),
    "decay_gate_backward_bounded.py": partial(
        _part, "decay_gate_backward", DecayGateProblem(size=96, gate="sigmoid"), ahead=1, BR=8
    ),
    "short_conv_backward_words.py": partial(
        _part,
        "short_conv_backward",
        _WITH_BIAS,
        BR=4,
        ahead=4,
        early=1,
        words=1,
        overlap=1,
        prefetch=1,
    ),
    "short_conv_backward_staged.py": partial(
        _part,
        "short_conv_backward",
        ConvolutionProblem(tensors=1),
        BR=1,
        ahead=4,
        words=1,
        num_stages=4,
        maxnreg=96,
    ),
    "gated_norm_backward_words.py": partial(
        _part, "gated_norm_backward", _OF_96, BR=16, BT=31, early=1, words=1, spread=1, overlap=1
    ),
    "mamba3_prologue_packed.py": partial(_part, "mamba3_prologue", _MAMBA3, BH=8),
    "mamba3_prologue_backward.py": partial(
        _part, "mamba3_prologue_backward", replace(_MAMBA3, packed=False), BH=8
    ),
    "mamba3_epilogue.py": partial(_part, "mamba3_epilogue", Mamba3Problem(gate=True), BH=8),
    "mamba3_epilogue_backward_packed.py": partial(_part, "mamba3_epilogue_backward", _MAMBA3),
    "mamba3_turns_packed.py": partial(_part, "mamba3_turns", _MAMBA3, BH=2),
    "mamba3_rotate_packed.py": partial(_part, "mamba3_rotate", _MAMBA3, BH=2),
    "mamba3_states.py": partial(_part, "mamba3_states", Mamba3Problem(angles=0), BV=64),
    "mamba3_output_packed.py": partial(
        _part, "mamba3_output", replace(_MAMBA3, angles=0), BV=64, maxnreg=128
    ),
    "mamba3_gate.py": partial(_part, "mamba3_gate", Mamba3Problem(gate=True)),
    "mamba3_reverse_states_packed.py": partial(
        _part, "mamba3_reverse_states", replace(_MAMBA3, angles=0), BV=64, maxnreg=128
    ),
    "mamba3_gradient.py": partial(
        _part, "mamba3_gradient", Mamba3Problem(skip=True), BH=8, BV=64, maxnreg=168
    ),
    "mamba3_gradient_packed.py": partial(
        _part, "mamba3_gradient", replace(_MAMBA3, head_dim=80), BV=64, parts=2
    ),
    "mamba3_scan_tilelang.py": partial(
        _part, "mamba3_scan", Mamba3Problem(angles=0, skip=True, gate=True, carried=True), keep=2
    ),
    "mamba3_scan_ahead_tilelang.py": partial(
        *(_part, "mamba3_scan", Mamba3Problem(angles=0, skip=True, gate=True)),
        **{"keep": 1, "num_stages": 2},
    ),
    "mamba3_weights.py": partial(_part, "mamba3_weights", Mamba3Problem(), BH=4),
    "mamba3_turning_scan_tilelang.py": partial(
        *(_part, "mamba3_turning_scan", Mamba3Problem(skip=True, gate=True, carried=True)), keep=2
    ),
    "mamba3_turning_scan_lean_tilelang.py": partial(
        _part, "mamba3_turning_scan", Mamba3Problem(state_size=64, angles=16), ahead=0
    ),
    "mamba3_reverse_scan_tilelang.py": partial(
        _part, "mamba3_reverse_scan", Mamba3Problem(skip=True, carried=True)
    ),
    "mamba3_reverse_scan_once_tilelang.py": partial(
        *(_part, "mamba3_reverse_scan", Mamba3Problem(skip=True)), pairs=1
    ),
    "mamba3_sums.py": partial(_part, "mamba3_sums", Mamba3Problem(), BH=8),
    "mamba3_sums_tokens.py": partial(
        *(_part, "mamba3_sums", Mamba3Problem()),
        **{"order": "tokens", "BG": 64, "BH": 8, "num_warps": 8, "num_stages": 3},
    ),
    "mamba3_step.py": partial(_part, "mamba3_step", replace(_MAMBA3, packed=False), BR=32),
    "package_states.py": _package,
    "package_packed.py": _package_packed,
    "package_kda.py": lambda: _package_of(Recipe.default(replace(_PACKED, op="kda"), "fast")),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_rendered_as_before(name: str, request: pytest.FixtureRequest) -> None:
    path = GOLDEN / name
    text = OUTPUTS[name]()
    if request.config.getoption("--update-golden"):
        replace_file(path, text)
    kept = path.read_text() if path.exists() else ""
    if text != kept:
        # line by line, so that the report shows the first difference rather than the whole file
        assert text.splitlines() == kept.splitlines(), (
            f"{path} is out of date; look at the difference, then `pytest --update-golden`"
        )


def test_nothing_else_is_kept() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {*OUTPUTS}


# What templates ask for, and what render gives them


def _parsed(path: Path) -> nodes.Template:
    return jinja2.Environment().parse(path.read_text())


@cache
def _wanted(template: str) -> frozenset[str]:
    """Undeclared variables of a template and of the shared pieces that it imports."""
    folder = templates_dir()
    tree = _parsed(folder / template)
    wanted = meta.find_undeclared_variables(tree)
    for other in meta.find_referenced_templates(tree):
        assert other is not None, f"{template} imports a template by a computed name"
        wanted |= _wanted(other)
    return frozenset(wanted)


def _forms(stage: str, language: str) -> list[Form]:
    return [x for x in EVERY_STAGE[stage].forms if x.language == language]


def _problem(stage: str) -> Compiled:
    found = EVERY_STAGE[stage]
    if isinstance(found, PartStage):
        return found.made_for()
    return Problem() if stage in STAGES else DecodingProblem()


def _config(stage: str, language: str) -> Config:
    BT = 32 if stage in STAGES else int(EVERY_STAGE[stage].chunks[0])
    return default_of(stage, _forms(stage, language)[0], Place(_problem(stage), BT))


def _given(stage: str, language: str) -> set[str]:
    made = context(_problem(stage), EVERY_STAGE[stage], _config(stage, language))
    return {*made, "digest", "regenerate"}


def _templates(stage: str, language: str) -> set[str]:
    return {template_name(x) for x in _forms(stage, language)}


def _stages_in(language: str) -> list[str]:
    return [x for x in EVERY_STAGE if _forms(x, language)]


KERNELS: Final = [(language, stage) for language in LANGUAGES for stage in _stages_in(language)]


@pytest.mark.parametrize(("language", "stage"), KERNELS)
def test_templates_ask_only_for_what_they_are_given(language: str, stage: str) -> None:
    for template in _templates(stage, language):
        unknown = _wanted(template) - _given(stage, language)
        assert not unknown, f"{template}: render.context gives no {sorted(unknown)}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_name_that_is_given_is_used(language: str) -> None:
    stages = _stages_in(language)
    wanted = {x for s in stages for name in _templates(s, language) for x in _wanted(name)}
    assert wanted == {x for s in stages for x in _given(s, language)}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_template_belongs_to_a_stage(language: str) -> None:
    folder = templates_dir() / language / "stages"
    found = {f"{language}/stages/{x.name}" for x in folder.iterdir()}
    own = {name for s in _stages_in(language) for name in _templates(s, language)}
    assert found == own | ({TABLES_TEMPLATE, SLOTS_TEMPLATE} if language == "triton" else set())
