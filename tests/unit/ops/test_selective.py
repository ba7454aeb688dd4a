"""Mamba-2's step in mamba_ssm's words: values, slots, graphs; and what it refuses, by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import pytest
import selective_checks
import torch
from selective_checks import CASES, Case, draw, nested

from gdn2gen import selective_state_update
from gdn2gen.base.errors import InputError, UnsupportedError

Check = Callable[..., Any]


@pytest.mark.parametrize("name", CASES)
def test_values(name: str, interpreter: Check) -> None:
    """By the reference, and by kernels; nothing is written but what an index names."""
    selective_checks.check_all(name)
    interpreter("selective_checks:check_all", name)


def test_a_buffer_and_what_is_read_as_it_lies(interpreter: Check) -> None:
    assert selective_checks.into_a_buffer()
    assert interpreter("selective_checks:into_a_buffer")
    assert interpreter("selective_checks:nothing_is_copied")


def test_a_process_that_was_warmed_up_loads_nothing(interpreter: Check) -> None:
    assert interpreter("selective_checks:nothing_is_loaded_after_warmup")


def test_calls_that_are_known(interpreter: Check) -> None:
    assert interpreter("selective_checks:known_calls")


def test_one_whole_graph_serves_all_sizes() -> None:
    assert selective_checks.whole_graphs() == 1


def _written_out(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda x: {name: x[name].contiguous()}


# Changes of a right call, and what is said of it.
BAD: Final[dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]]] = {
    "no tensor": (lambda x: {"C": None}, "C must be a tensor, but got NoneType"),
    "a number": (lambda x: {"D": 1.0}, "D must be a tensor or None, but got float"),
    "a flag": (lambda x: {"dt_softplus": 1}, "dt_softplus must be True or False, but got 1"),
    "a rank": (lambda x: {"x": x["x"][0]}, r"x must be [b, h, P], [b, T, h, P], or with cu_seql"),
    "groups": (lambda x: {"B": x["B"][:, :0]}, "a multiple of the groups of B, but got 4 and 0"),
    "a state": (lambda x: {"state": x["state"].mT}, "state must be (6, 4, 16, 24), but got (6, 4"),
    "A of another size": (lambda x: {"A": x["A"][:2]}, "A must be (4, 16, 24), but got (2, 16, 24"),
    "C of another size": (lambda x: {"C": x["C"][:2]}, "C must be (3, 2, 24), but got (2, 2, 24)"),
    "a flat D": (lambda x: {"D": x["D"][:, 0]}, "D must be (4, 16), but got (4,)"),
    "another dtype": (lambda x: {"B": x["B"].half()}, "B must have the dtype of C, torch.float32"),
    "a state in fp16": (lambda x: {"state": x["state"].half()}, "state must be float32 or bfl"),
    "indices": (lambda x: {"state_batch_indices": x["state_batch_indices"][:2]},
                "state_batch_indices must be [N] or [N, 1+S] with N=3"),
    "too few slots": (lambda x: {"state_batch_indices": None, "state": x["state"][:2]},
                      "state must have a slot for each of N=3 sequences, but has 2"),
    "null_slot": (lambda x: {"null_slot": 0, "state_batch_indices": None},
                  "null_slot is of state_batch_indices"),
    "out": (lambda x: {"out": x["x"][:2]}, "out must be (3, 4, 16), but got (2, 4, 16)"),
    "out in fp16": (lambda x: {"out": x["x"].half()}, "out must have the dtype of x"),
    "rows over each other": (lambda x: {"out": x["x"][:1].expand(3, 4, 16)},
                             "out is written in place: heads and channels of a row must follow"),
    "slots over each other": (lambda x: {"state": x["state"][:1].expand(6, -1, -1, -1)},
                              "state is written in place"),
    "nested": (lambda x: {"z": nested(x["z"])}, "z must be a dense tensor, but is nested"),
}  # fmt: skip
REFUSED: Final[dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]]] = {
    "dt": (_written_out("dt"), "dt must be one number a head, repeated over its channels"),
    "A": (_written_out("A"), "A must be one number a head"),
    "dt_bias": (_written_out("dt_bias"), "dt_bias must be one number a head"),
    "no heads": (lambda x: {"x": x["x"][:, 0], "state": x["state"][:, 0]},
                 "kernels for heads of Mamba-2"),
    "a gradient": (lambda x: {"x": x["x"].requires_grad_()},
                   "selective_state_update has no backward, but x requires a gradient"),
    "a state's gradient": (lambda x: {"state": x["state"].detach().requires_grad_()},
                           "selective_state_update has no backward, but state requires a gradient"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*BAD, *REFUSED])
def test_bad_input_is_refused_by_its_name(name: str) -> None:
    given, storage = draw(Case(), "cpu")
    before, refused = storage.clone(), name in REFUSED
    change, said = (REFUSED if refused else BAD)[name]
    with pytest.raises(UnsupportedError if refused else InputError, match=re.escape(said)):
        selective_state_update(**given | change(given))
    assert torch.equal(storage, before)
