"""What a look-up is remembered under is what it was made from, whatever another thread does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Final

import pytest
import torch
from faked_driver import Driver, faked
from recorded_launches import FLAGS, GATED, forget, make

import gdn2gen
from gdn2gen import chunk_gdn2, fused_recurrent_gdn2
from gdn2gen.base import decay, environment
from gdn2gen.base.device import named_device
from gdn2gen.base.environment import batch_invariant
from gdn2gen.base.errors import UnsupportedError
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.ops import _call, _decode
from gdn2gen.runtime import autograd, call, decoding, lookup, prefill
from gdn2gen.store import gates, pins, verified
from gdn2gen.store import surroundings as store
from gdn2gen.store.dispatch import find_recipe
from gdn2gen.store.gates import is_apart

H200: Final = named_device("H200")
TRAIN: Final = Regime(tokens=16384, sequences=4, heads=16)
LONG: Final = Regime(tokens=8192, sequences=1, heads=4)
LAYER: Final = Problem(gate="softplus", gate_dtype="bf16", has_A_log=True, has_dt_bias=True)


class Elsewhere:
    """What another thread does as soon as a call, or a look-up, has read its surroundings; by then
    nothing was looked up."""

    def __init__(self) -> None:
        self.does: Callable[[], Any] | None = None

    def surroundings(self) -> tuple[Any, ...]:
        found = _READ()
        if self.does is not None:
            does, self.does = self.does, None
            thread = Thread(target=does)
            thread.start()
            thread.join()
        return found


_READ: Final = store.surroundings


@pytest.fixture(name="elsewhere")
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    for name in store.VARIABLES[2:-1]:
        monkeypatch.setenv(name, "")
    found = Elsewhere()
    for module in (store, lookup, prefill, gates, _call):
        monkeypatch.setattr(module, "surroundings", found.surroundings)
    monkeypatch.setattr(decoding, "of_look_ups", found.surroundings)
    _forget_all()
    yield found
    pins.forget()
    _forget_all()


def _forget_all() -> None:
    forget()
    for cached in (prefill._runner, gates._is_better):
        cached.cache_clear()


def _request(regime: Regime = LONG) -> lookup.Request:
    sequences, heads = regime.sequences, (regime.heads,) * 3
    sizes = sequences, regime.tokens // sequences, *heads, sequences, 1.0, None
    return lookup.Request(Problem(), call.Call(*sizes, packed=False, device=torch.device("cpu")))


class Invariant:
    """Enters and leaves the mode as another thread does, whatever this one does in between."""

    def enter(self) -> None:
        self._mode = batch_invariant()
        self._mode.__enter__()

    def leave(self) -> None:
        self._mode.__exit__(None, None, None)


class Pinned:
    """Pins other knobs, and then nothing."""

    def enter(self) -> None:
        recipe = Recipe.default(Problem(), "lean", arch="sm_90")
        recipe = recipe.with_config(recipe["scan"].replace(num_warps=8))
        given = [
            pins.Pin(recipe, TRAIN, level, H200.name, "sm_90").document
            for level in ("lean", "fast")
        ]
        pins.forget()  # what ran may not be pinned otherwise
        gdn2gen.pin({"recipes": given})

    def leave(self) -> None:
        pins.forget()


LOOK_UPS: Final[dict[str, Callable[[lookup.Request, str], Any]]] = {
    "a call": lambda x, _: lookup.find_runner(x, "lean").runner,
    "a call without a gradient": lambda x, _: lookup.find_runner(x, "fast", False).runner,
    "what the ops of a graph agreed on": lambda x, text: lookup.agreed_runner(x, text).runner,
    "serving": lambda x, _: prefill._sized(x, "weak", {}, None).runner,
}
# What was agreed on may be kept to in the mode, too: it is the same there.
CASES: Final = [(x, y) for x in LOOK_UPS for y in (Invariant, Pinned)
                if y is Pinned or not x.startswith("what")]  # fmt: skip


@pytest.mark.parametrize(("name", "other"), CASES)
def test_a_look_up_is_remembered_for_what_it_was_made_from(
    name: str, other: type[Invariant | Pinned], elsewhere: Elsewhere
) -> None:
    request, change = _request(), other()
    text, look = lookup.agree(request, "lean"), LOOK_UPS[name]

    def found() -> Any:
        runner = look(request, text)
        return runner.recipe.by_stage, runner._agreed_segments

    usual = found()
    change.enter()
    changed = found()
    change.leave()
    assert changed != usual, "the check can fail"
    _forget_all()
    elsewhere.does = change.enter
    assert found() == usual and elsewhere.does is None
    change.leave()
    assert found() == usual
    _forget_all()
    change.enter()
    elsewhere.does = change.leave
    assert found() == changed and elsewhere.does is None


@pytest.mark.parametrize("other", [Invariant, Pinned])
def test_whether_a_gate_is_apart(other: type[Invariant | Pinned], elsewhere: Elsewhere) -> None:
    """Pinned is a recipe with the gate, which then stays there."""
    change = other()
    within = find_recipe(LAYER, TRAIN, H200).recipe
    pin = {"recipes": [pins.Pin(within, TRAIN, "lean", H200.name, H200.arch).document]}
    enter = change.enter if other is Invariant else partial(gdn2gen.pin, pin)
    enter()
    assert not is_apart(LAYER, TRAIN, H200), "the check can fail"
    change.leave()
    for _ in range(2):
        elsewhere.does = enter
        assert is_apart(LAYER, TRAIN, H200) and elsewhere.does is None
        change.leave()


def test_what_was_read_of_the_environment_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def says() -> tuple[Any, ...]:
        return (
            *around.folders, around.strict, around.compiled_dir, around.batch_invariant,
            around.gate_apart, decay.expected_by(None, around.decay), around.unverified,
        )  # fmt: skip

    for name in store.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GDN2GEN_CACHE_DIR", str(tmp_path / "a"))
    before = around = store.Surroundings.of()
    usual = says()
    assert usual[0] == tmp_path / "a" / "tuned"
    assert usual[2:] == (False, None, False, None, "weak", None)
    for name, value, at, found in (
        ("GDN2GEN_CACHE_DIR", tmp_path / "b", 0, tmp_path / "b" / "tuned"),
        ("GDN2GEN_TUNED_DIR", tmp_path / "c", 0, tmp_path / "c"),
        ("GDN2GEN_STRICT", "1", 2, True),
        ("GDN2GEN_COMPILED_DIR", tmp_path / "d", 3, tmp_path / "d"),
        ("GDN2GEN_BATCH_INVARIANT", "1", 4, True),
        ("GDN2GEN_GATE_APART", "0", 5, False),
        ("GDN2GEN_EXPECTED_DECAY", "strong", 6, "strong"),
        ("GDN2GEN_UNVERIFIED", "1", 7, "1"),
    ):
        monkeypatch.setenv(name, str(value))
        around = before
        assert says() == usual
        around = store.Surroundings.of()
        assert says()[at] == found != usual[at]


# Of a call, which asks once, and has what it asked for looked up.


@pytest.fixture(name="driver")
def _driver(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Driver]:
    yield from faked(monkeypatch, tmp_path, [0])


@pytest.mark.parametrize("turn", [0, 1], ids=["first", "known"])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_call_that_comes_to_be_known(
    gradient: bool, turn: int, driver: Driver, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overtaken when it is made first, or when what was kept of it first runs."""
    ran: list[Any] = []
    run_known = autograd.run_known

    def noting(tensors: Any, runner: Any, **named: Any) -> Any:
        found = runner(gradient).runner
        ran.append((found.recipe.by_stage, found._agreed_segments))
        return run_known(tensors, runner, **named)

    monkeypatch.setattr(autograd, "run_known", noting)
    inputs, change = make(B=1, T=200), Invariant()

    def call() -> Any:
        with torch.set_grad_enabled(gradient):
            chunk_gdn2(**inputs, **FLAGS)
        return ran[-1]

    usual = call()
    change.enter()
    assert call() != usual, "the check can fail"
    change.leave()
    _forget_all()
    for i in range(4):
        elsewhere.does = change.enter if i == turn else None
        assert call() == usual and elsewhere.does is None
        if i == turn:
            change.leave()


def test_a_call_whose_head_dims_are_refused(
    driver: Driver, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though another thread allows them once it is known what is allowed."""
    monkeypatch.setattr(verified, "is_verified", lambda *_: False)
    mode, inputs = environment.verifying(), make()
    for step in (False, True):
        given = make(B=1, T=1) if step else inputs
        for i in range(3):
            if i == 0:
                elsewhere.does = mode.__enter__
            with pytest.raises(UnsupportedError, match="were not verified"), torch.no_grad():
                (fused_recurrent_gdn2 if step else chunk_gdn2)(**given, **FLAGS)
            assert elsewhere.does is None
            if i == 0:
                mode.__exit__(None, None, None)
        mode = environment.verifying()


def test_a_call_whose_gate_stays_within(
    driver: Driver, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_call, "_Apart", None)
    inputs = make() | GATED
    for i in range(3):
        if i == 0:
            elsewhere.does = partial(monkeypatch.setenv, "GDN2GEN_GATE_APART", "1")
        with torch.no_grad():
            chunk_gdn2(**inputs, **FLAGS)
        assert elsewhere.does is None
        monkeypatch.delenv("GDN2GEN_GATE_APART", raising=False)


def test_a_call_by_the_environments_word_of_its_decay(
    driver: Driver, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, init = [], _call._Ready.__init__

    def noting(self: Any, *given: Any) -> None:
        init(self, *given)
        words.append(self._decay)

    monkeypatch.setattr(_call._Ready, "__init__", noting)
    elsewhere.does = partial(monkeypatch.setenv, decay.VARIABLE, "strong")
    with torch.no_grad():
        chunk_gdn2(**make(), **FLAGS)
    assert words == ["weak"] and elsewhere.does is None


def test_a_step_of_decoding(
    driver: Driver, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, launch = [], _decode.launch_plan

    def noting(signature: Any, plan: decoding.Plan, *given: Any, **named: Any) -> Any:
        ran.append(plan.config)
        return launch(signature, plan, *given, **named)

    monkeypatch.setattr(_decode, "launch_plan", noting)
    inputs, change = make(B=600, T=1), Invariant()

    def step() -> Any:
        with torch.no_grad():
            fused_recurrent_gdn2(**inputs, **FLAGS)
        return ran[-1]

    usual = step()
    change.enter()
    assert step() != usual, "the check can fail"
    change.leave()
    _forget_all()
    for i in range(3):
        elsewhere.does = change.enter if i == 0 else None
        assert step() == usual and elsewhere.does is None
        if i == 0:
            change.leave()
