"""scripts/learning/profiling.py: a trace by kinds and operations, and where the GPU waited."""

from __future__ import annotations

from typing import Any

import pytest
from script_module import load_script

load_script("model_speed")
from learning.profiling import Ran, Seen, ran_in, short  # noqa: E402

ADD = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, "
    "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<float>)"
)
COPY = (
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda, float>(int)"
)


def _operation(name: str, number: int, us: float, *shapes: Any) -> dict[str, Any]:
    args = {"External id": number, "Input Dims": list(shapes)}
    return {"cat": "cpu_op", "name": name, "ts": 0.0, "dur": us, "args": args}


def _kernel(name: str, start: float, us: float, number: int | None = None) -> dict[str, Any]:
    args = {} if number is None else {"External id": number}
    return {"cat": "kernel", "name": name, "ts": start, "dur": us, "args": args}


def test_kernels_are_told_by_the_innermost_operation() -> None:
    events = [
        {"name": "process_name", "ph": "M"},
        _operation("aten::to", 7, 9.0, [4, 8]),
        _operation("aten::copy_", 7, 3.0, [4, 8], [], [4, 8]),
        _operation("aten::cat", 8, 1.0, [[2, 3], [2, 3]]),
        _kernel(COPY, 0.0, 5.0, 7),
        _kernel("cat_kernel<float>", 5.0, 1.0, 8),
        _kernel("cat_kernel<float>", 6.0, 1.0, 99),
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0.0, "dur": 1.0, "args": {}},
    ]
    found = ran_in(events)
    assert [x.operation for x in found] == ["aten::copy_ 4x8 4x8", "aten::cat 2*", ""]
    assert [x.us for x in found] == [5.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "operation", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", "aten::mm 4x4 4x4", "matmul"),
        ("void pytorch_flash::flash_fwd_kernel<x>(p)", "torch_attn::_varlen_attn", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(p)", "", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_fprop", "", "attention"),
        ("void cudnn::fusion::compute_dot_do_o<x>(p)", "", "attention"),
        ("void at::native::multi_tensor_apply_kernel<x>(p)", "aten::_fused_adamw_", "optimizer"),
        ("void cunn_SoftMaxForward<8, float>(p)", "aten::_log_softmax 4x4", "loss"),
        ("grad_group_kernel", "", "recurrence and its parts"),
        (ADD, "aten::add 4x4 4x4", "elementwise"),
        (ADD, "", "elementwise"),
        (COPY, "aten::copy_ 4x4", "casts and copies"),
        (COPY, "", "casts and copies"),
        ("Memset (Device)", "", "casts and copies"),
        ("void at::native::vectorized_layer_norm_kernel<x>(p)", "aten::_fused_rms_norm", "norms"),
        ("void at::native::distribution_kernel<x>(p)", "aten::normal_ 4", "elementwise"),
        ("void some::thing<x>(p)", "", "other kernels"),
    ],
)
def test_kinds(name: str, operation: str, kind: str) -> None:
    assert Ran(name, 0.0, 1.0, operation).kind == kind


def test_a_name_without_what_all_have() -> None:
    assert short(ADD) == "vectorized_elementwise_kernel CUDAFunctor_add"
    assert short("grad_group_kernel") == "grad_group_kernel"


def test_gaps_are_where_nothing_runs() -> None:
    """Kernels side by side, one within another, and two gaps."""
    a, b, c, d = (
        Ran(name, start, us)
        for name, start, us in (("a", 0, 10), ("b", 2, 3), ("c", 12, 1), ("d", 20, 5))
    )
    seen = Seen([d, b, a, c], 1.5)
    assert seen.span_us == 25
    assert seen.gaps() == [(7, c, d), (2, a, c)]
    assert [(name, x.launches, x.us) for name, x in seen.by(lambda x: x.kind)] == [
        ("recurrence and its parts", 4, 19)
    ]
    words = seen.sheets("a step", 3)[-1]
    assert "launched in 1.5 ms; idle 0.01 ms, of which 1 gaps" in words
    assert "7 us between c and d" in words
