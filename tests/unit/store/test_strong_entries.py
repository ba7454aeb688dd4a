"""Entries for strong decay: on file beside those for weak, found where it is expected."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gdn2gen
from gdn2gen.base import paths
from gdn2gen.base.device import named_device
from gdn2gen.base.errors import DispatchError, InputError, StoreError
from gdn2gen.codegen import render
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.runtime import lookup
from gdn2gen.store import pins, tuned_files
from gdn2gen.store._claims import always_checked
from gdn2gen.store.dispatch import Found, explain_recipe, find_recipe, recipe_document, tune_command
from gdn2gen.store.format import entry_to
from gdn2gen.store.surroundings import Surroundings, surroundings
from gdn2gen.store.tuned_files import Entry

H200 = named_device("H200")
PROBLEM = Problem()
TRAIN = Regime(tokens=16384, sequences=4, heads=16)
FAR = Regime(tokens=2048, sequences=1, heads=32)


@pytest.fixture(autouse=True)
def _house(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(render, "template_digest", lambda config: f"d-{config.stage}")
    monkeypatch.setattr(paths, "packaged_tuned_dir", lambda: tmp_path / "packaged")
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path))
    monkeypatch.delenv("GDN2GEN_STRICT", raising=False)
    pins.forget()
    yield
    pins.forget()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tuned_files.tuned_path(tmp_path, "gdn2", H200)


def _entry(
    decay: str, ms: float = 2.0, regime: Regime = TRAIN, *, mark: int = 4, **changes: Any
) -> Entry:
    """Told by `mark`, the num_stages of its scan."""
    recipe = Recipe.default(PROBLEM)
    recipe = recipe.with_config(recipe["scan"].replace(num_stages=mark))
    entry = Entry(
        problem_key=PROBLEM.key,
        regime_key=regime.key,
        level="lean",
        plan="lean",
        configs=recipe.by_stage,
        templates={x: f"d-{x}" for x in recipe.by_stage},
        measured={"forward_ms": 1.0, "forward_backward_ms": ms},
        gate=dict.fromkeys(always_checked("gdn2"), 1e-5),
        provenance="measured",
        decay=decay,
    )
    return dataclasses.replace(entry, **changes)


def _file(path: Path, *entries: Entry) -> tuned_files.TunedFile:
    return tuned_files.merge_entries(path, tuned_files.metadata_for(H200, {}, "a test"), entries)


def _mark(found: Found) -> object:
    return found.recipe["scan"]["num_stages"]


# On file


def test_a_file_says_it_of_strong_entries_alone(path: Path) -> None:
    """Those that were filed before there was the word are for weak decay, and keep their bytes."""
    weak, strong = _entry("weak", 1.0), _entry("strong", 2.0)
    assert "decay" not in entry_to(weak) and entry_to(strong)["decay"] == "strong"
    _file(path, weak)
    before = path.read_text()
    _file(path, strong)
    file = tuned_files.load_tuned(path, H200)
    assert file is not None and file.entries == (weak, strong), "neither replaces the other"
    raw = json.loads(path.read_text())
    raw["entries"] = [x for x in raw["entries"] if "decay" not in x]
    assert raw["entries"] == json.loads(before)["entries"]
    assert weak.size != strong.size and not tuned_files.stand_ins(file.entries)
    assert "decay=strong" in strong.label and "decay" not in weak.label


def test_a_faster_entry_replaces_one_for_the_same_decay(path: Path) -> None:
    file = _file(path, _entry("weak"), _entry("strong", 3.0), _entry("strong", 2.5, mark=2))
    assert [x.measured["forward_backward_ms"] for x in file.entries] == [2.0, 2.5]
    assert len(_file(path, _entry("strong", 2.7)).entries) == 2


@pytest.mark.parametrize(
    ("decay", "said"), [("fierce", "decay must be one of"), (3, "decay must be of str")]
)
def test_another_word_on_file_is_set_aside(path: Path, decay: object, said: str) -> None:
    _file(path, _entry("weak"), _entry("strong"))
    raw = json.loads(path.read_text())
    raw["entries"][1]["decay"] = decay
    path.write_text(json.dumps(raw))
    file = tuned_files.load_tuned(path, H200)
    assert file is not None and len(file.entries) == 1
    (unread,) = file.unread
    assert said in unread.reason
    # a merge of what is for weak decay does not lose it
    kept = _file(path, _entry("weak", 1.5, mark=2))
    assert len(kept.unread) == 1 and _file(path, _entry("strong")).unread == kept.unread


def test_what_takes_as_long_under_any_decay_has_no_such_entry(tmp_path: Path) -> None:
    problem = Problem("gated_delta_rule")
    recipe = Recipe.default(problem)
    entry = _entry(
        "strong",
        problem_key=problem.key,
        level=recipe.level,
        plan=recipe.plan.name,
        configs=recipe.by_stage,
        templates={x: f"d-{x}" for x in recipe.by_stage},
        gate=dict.fromkeys(always_checked("gated_delta_rule"), 1e-5),
    )
    with pytest.raises(StoreError, match="take as long under any decay"):
        _file(tuned_files.tuned_path(tmp_path, "gated_delta_rule", H200), entry)


# Found


def test_a_call_finds_what_is_for_its_decay(path: Path) -> None:
    _file(path, _entry("weak", 1.0, mark=2), _entry("strong", 3.0, mark=3))
    for decay, mark in (("weak", 2), ("strong", 3)):
        found = find_recipe(PROBLEM, TRAIN, H200, decay=decay)
        assert (found.source, _mark(found), found.tuned_decay) == ("exact", mark, decay)
        assert tune_command(found) is None
    assert _mark(find_recipe(PROBLEM, TRAIN, H200)) == 2


def test_strong_at_other_sizes_comes_before_weak_at_its_own(path: Path) -> None:
    _file(path, _entry("weak", mark=2), _entry("strong", 9.0, FAR, mark=3))
    found = find_recipe(PROBLEM, TRAIN, H200, decay="strong")
    assert (found.source, _mark(found)) == ("nearest", 3)
    assert "level=lean decay=strong] of" in found.why
    command = tune_command(found)
    assert command is not None and command.endswith("--level lean --decay strong")


def test_without_any_it_is_what_weak_decay_has(path: Path) -> None:
    """Never an error, and never called exact."""
    _file(path, _entry("weak", mark=2))
    found = find_recipe(PROBLEM, TRAIN, H200, decay="strong")
    assert found.recipe == find_recipe(PROBLEM, TRAIN, H200).recipe
    assert (found.source, found.decay, found.tuned_decay) == ("nearest", "strong", "weak")
    assert "nothing that serves is tuned under strong decay" in found.why
    text = explain_recipe(found)
    assert "decay     strong, kernels for weak" in text and "--decay strong" in text
    assert recipe_document(found)["tuned_decay"] == "weak"
    with pytest.raises(DispatchError, match="--decay strong"):
        find_recipe(PROBLEM, TRAIN, H200, decay="strong", strict=True)
    assert "decay" not in explain_recipe(find_recipe(PROBLEM, TRAIN, H200)).replace("decay=", "")


def test_a_stale_strong_entry_is_named(path: Path) -> None:
    stale = {**_entry("strong").templates, "scan": "d-other"}
    _file(path, _entry("weak", mark=2), _entry("strong", mark=3, templates=stale))
    found = find_recipe(PROBLEM, TRAIN, H200, decay="strong")
    assert (_mark(found), found.stale) == (2, True)
    assert "passed over the stale entry" in found.why and "decay=strong" in found.why


def test_nothing_on_file_is_the_default() -> None:
    found = find_recipe(PROBLEM, TRAIN, H200, decay="strong")
    assert (found.source, found.recipe) == ("default", find_recipe(PROBLEM, TRAIN, H200).recipe)


def test_where_times_do_not_depend_on_it_nobody_looks() -> None:
    problem = Problem("gated_delta_rule")
    found = find_recipe(problem, TRAIN, H200, decay="strong")
    assert found.decay == "weak"
    with pytest.raises(InputError, match="decay must be one of"):
        find_recipe(PROBLEM, TRAIN, H200, decay="fierce")


def test_without_a_gradient_strong_stays_strong(path: Path) -> None:
    """Of the level that keeps least there is an entry for weak decay alone, near in size."""
    _file(path, _entry("weak", mark=2), _entry("strong", level="fast", regime=FAR, mark=3))
    request = _request()
    found = lookup.find_for(request, "fast", False, "strong", Surroundings.of())
    assert (_mark(found), found.tuned_decay) == (3, "strong")


def test_ops_of_a_traced_call_agree_on_it(path: Path) -> None:
    """Though what they see of it is a text: the backward finds what the forward found."""
    _file(path, _entry("weak", mark=2), _entry("strong", mark=3))
    request = _request()
    for decay, mark in (("weak", 2), ("strong", 3)):
        text = lookup.agree(request, "lean", decay)
        assert lookup.Agreement.parse(text).decay == decay
        sized = lookup._agreed.__wrapped__(request, text, surroundings())
        assert sized.runner.recipe["scan"]["num_stages"] == mark


def _request() -> Any:
    import torch

    from gdn2gen.runtime.call import Call

    call = Call(4, 4096, 16, 16, 16, 4, 1.0, None, packed=False, device=torch.device("cpu"))
    return lookup.Request(PROBLEM, call)


# Pinned


def test_what_ran_under_either_is_pinned_for_it(path: Path) -> None:
    _file(path, _entry("weak", mark=2), _entry("strong", mark=3))
    for decay in ("weak", "strong"):
        found = find_recipe(PROBLEM, TRAIN, H200, decay=decay)
        pins.record(found.recipe, TRAIN, H200, "lean", decay)
    recipes = json.loads(json.dumps(gdn2gen.pin()))
    assert sorted(x.get("decay", "weak") for x in recipes["recipes"]) == ["strong", "weak"]
    path.unlink()
    gdn2gen.reload()
    pins.forget()
    gdn2gen.pin(recipes)
    for decay, mark in (("weak", 2), ("strong", 3)):
        found = find_recipe(PROBLEM, TRAIN, H200, decay=decay)
        assert (found.source, _mark(found), found.tuned_decay) == ("pinned", mark, decay)
    # as among entries: what is there for weak decay serves
    weak = [x for x in recipes["recipes"] if "decay" not in x]
    gdn2gen.pin({"recipes": weak}, strict=True)
    found = find_recipe(PROBLEM, TRAIN, H200, decay="strong")
    assert (found.source, _mark(found), found.tuned_decay) == ("pinned", 2, "weak")
    broken = [{**weak[0], "decay": "fierce"}]
    with pytest.raises(DispatchError, match="cannot be read"):
        gdn2gen.pin({"recipes": broken})
