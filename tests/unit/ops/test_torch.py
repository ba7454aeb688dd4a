"""The op within torch: transforms, tracers, recipes that change; by the reference and by kernels.

One answer in both: it works, or is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch_checks

Check = Callable[..., Any]
CHECKS: Final = torch_checks


@pytest.mark.parametrize("check", ["func_grad", "jacobian", "first_order_of_a_graph"])
def test_derivatives(check: str, run: Check) -> None:
    run(check)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_vmap(packed: bool, run: Check) -> None:
    run("vmap", packed)


@pytest.mark.parametrize("name", torch_checks.REFUSED)
def test_other_derivatives_are_refused(name: str, run: Check) -> None:
    run("refused", name)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_one_graph_serves_all_lengths(packed: bool, run: Check) -> None:
    assert run("compiled_lengths", (20, 33, 64, 70), packed, True) == 1


def test_a_second_length_makes_the_last_graph(run: Check) -> None:
    assert run("compiled_lengths", (20, 33, 47, 31, 70), False, None) == 2


def test_a_length_marked_dynamic(run: Check) -> None:
    run("marked_dynamic")


def test_tensors_without_data_have_shapes(run: Check) -> None:
    run("without_data")


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_views_that_no_kernel_could_read(packed: bool, run: Check) -> None:
    run("lazy_views", packed)


def test_compiled_at_other_head_dims(interpreter: Callable[..., Any]) -> None:
    said = interpreter("op_checks:compiled_at_other_head_dims", "gdn2")
    assert "K=72, V=72 in fp32 were not verified" in said


@pytest.mark.parametrize("how", ["eager", "compiled", "checkpointed"])
def test_a_recipe_that_changes_before_the_backward(
    how: str, tmp_path: Path, interpreter: Check
) -> None:
    interpreter("torch_checks:recipe_changes_before_the_backward", how, str(tmp_path))
