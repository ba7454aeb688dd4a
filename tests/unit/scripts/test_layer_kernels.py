"""scripts/layer_kernels.py: times of kernels, of which some may run side by side."""

from __future__ import annotations

from script_module import load_script

layer_kernels = load_script("layer_kernels")


def test_what_lies_between_kernels() -> None:
    # b runs beside the end of a; then 3 us of nothing
    kernels = [("b", 8.0, 4.0), ("a", 0.0, 10.0), ("a", 15.0, 5.0)]
    assert layer_kernels.account(kernels, 1) == [("a", 2, 15), ("b", 1, 4), ("between", 0, 3)]
    assert layer_kernels.account(kernels * 1, 2)[0] == ("a", 1, 7.5)
    assert layer_kernels.account([], 5) == [("between", 0.0, 0.0)]
