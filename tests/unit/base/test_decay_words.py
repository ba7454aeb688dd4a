"""The words for how strong a decay is expected to be, and who says which."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import gdn2gen
from gdn2gen.base import decay
from gdn2gen.base.errors import InputError
from gdn2gen.ops import _call
from gdn2gen.runtime import options


def test_weak_unless_somebody_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(decay.VARIABLE, raising=False)
    assert decay.expected() == "weak"
    for said, found in ((" Strong ", "strong"), ("", "weak"), ("weak", "weak")):
        monkeypatch.setenv(decay.VARIABLE, said)
        assert decay.expected() == found
    monkeypatch.setenv(decay.VARIABLE, "strong")
    with gdn2gen.expected_decay("weak"):
        assert decay.expected() == "weak"
        with gdn2gen.expected_decay("strong"):
            assert decay.expected() == "strong"
        assert decay.expected() == "weak"
    assert decay.expected() == "strong"


def test_it_holds_on_all_threads() -> None:
    """A checkpoint is computed once more on a thread of autograd's."""
    seen: list[str] = []
    with gdn2gen.expected_decay("strong"):
        thread = threading.Thread(target=lambda: seen.append(decay.expected()))
        thread.start()
        thread.join()
    assert seen == ["strong"]


def test_other_words_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("fierce", None, 3, True, ["strong"]):
        with pytest.raises(InputError, match="decay must be one of"), gdn2gen.expected_decay(word):  # type: ignore[arg-type]
            pass
    monkeypatch.setenv(decay.VARIABLE, "fierce")
    with pytest.raises(InputError, match=r"GDN2GEN_EXPECTED_DECAY must be one of .* 'fierce'"):
        decay.expected()


def _arguments(op: str) -> dict[str, torch.Tensor]:
    from gdn2gen.family.inputs import make_inputs

    return make_inputs(1, 3, 1, 16, 16, op=op)


@pytest.mark.parametrize("op", ["gdn2", "kda", "gla"])
def test_a_call_comes_before_its_process(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def run(_: Any, tensors: Any, options: Any, level: str, word: str, *rest: Any, **more: Any):  # type: ignore[no-untyped-def]
        told.append(word)
        return tensors[0], None

    monkeypatch.setattr(_call.autograd, "run", run)
    function, inputs = getattr(gdn2gen, f"chunk_{op}"), _arguments(op)
    function(**inputs)
    with gdn2gen.expected_decay("strong"):
        function(**inputs)
        function(**inputs, expected_decay="weak")
    function(**inputs, expected_decay="strong")
    assert told == ["weak", "strong", "weak", "strong"]
    with pytest.raises(InputError, match=r"expected_decay must be one of .* 'fierce'"):
        function(**inputs, expected_decay="fierce")


def test_where_no_channel_decays_by_itself_it_is_weak() -> None:
    for op, found in (("gated_delta_rule", "weak"), ("delta_rule", "weak"), ("kda", "strong")):
        assert options.decay_of_call(_signature(op), None, "strong") == found, op
        assert options.decay_of_call(_signature(op), "strong", None) == found, op


def _signature(op: str) -> Any:
    from gdn2gen.runtime.signature import signature_of

    return signature_of(op)
