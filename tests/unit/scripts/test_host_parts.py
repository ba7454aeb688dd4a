"""The script that says where the host's time of a forward and backward goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faked_driver import Driver, faked
from script_module import load_script

from gdn2gen.runtime import autograd
from gdn2gen.runtime.bound import Bound

OWN = ("until Function.apply", "forward's body", "backward's body")


@pytest.fixture(name="driver")
def _driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Driver]:
    monkeypatch.delenv("GDN2GEN_BOUND", raising=False)
    yield from faked(monkeypatch, tmp_path, [0])


@pytest.fixture(name="script")
def _script() -> Any:
    return load_script("host_parts")


@pytest.fixture(name="case")
def _case(script: Any, driver: Driver) -> Any:
    assert not driver.launched
    return script.Case.of("gdn2", 1, 20, 2, None, "cpu")


def test_a_call_comes_to_every_border(
    script: Any, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work that is put into one part shows there, and in no other."""
    own = {**vars(autograd._Function)}, autograd._apply
    with script.marked() as marks:
        call = script.call_of(case, marks)
        before = script.parts_of(call, 20, 6)
        bound = Bound.run

        def slow(self: Bound, addresses: list[int]) -> Any:
            script.time.sleep(2e-3)
            return bound(self, addresses)

        monkeypatch.setattr(Bound, "run", slow)
        after = script.parts_of(call, 5, 1)
    named = dict(zip(script.PARTS, zip(before, after, strict=True), strict=True))
    assert {name for (name, _), (x, y) in named.items() if y > x + 1500} == {*OWN[1:]}
    assert {name for name, whose in script.PARTS if whose} == {*OWN}
    assert all(x > 0 for x in before)
    for name in ("forward", "backward"):
        assert vars(autograd._Function)[name].__func__ is own[0][name].__func__
    assert autograd._apply is own[1]


def test_a_call_that_goes_another_way_is_told(script: Any, case: Any) -> None:
    by_torch = replace(case, function=lambda **x: (x["v"] * 2 + 0 * sum(map(_sum, x.values())),))
    with (
        script.marked() as marks,
        pytest.raises(ValueError, match="every border"),
    ):
        script.parts_of(script.call_of(by_torch, marks), 1, 0)


def _sum(x: Any) -> Any:
    return x.sum() if hasattr(x, "sum") else 0


def test_what_is_ours_and_what_is_not_make_up_all(script: Any) -> None:
    columns = {"one": [1.0, 2, 4, 8, 16, 32, 64, 128], "other": [0.5] * 8}
    rows = [x.split(" | ") for x in script.table(columns).splitlines()]
    assert rows[0][1:] == ["one", "other |"] and len(rows) == 2 + 8 + 3
    assert [x[1] for x in rows[-3:]] == ["37.0", "218.0", "255.0"]
    assert [x[2] for x in rows[-3:]] == ["1.5 |", "2.5 |", "4.0 |"]
