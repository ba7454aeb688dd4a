"""Knobs of decoding on file: which calls they are of, what is passed over, what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

import gdn2gen
from gdn2gen.base.device import Device, named_device
from gdn2gen.base.errors import StoreError, TunedFileWarning
from gdn2gen.family.decoding import DecodingProblem
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.runtime import decoding as runtime
from gdn2gen.store import decoding, tuned_files
from gdn2gen.store.decoding import DecodingEntry, decoding_path, merge_decoding, nearest_of_each

H200: Final = named_device("H200")
STEP: Final = DecodingProblem(
    op="gated_delta_rule", state_v_first=True, state_bf16=True, pool=True, indexed=True,
    one_token=True,
)  # fmt: skip
KNOBS: Final[Mapping[str, Any]] = {"BV": 8, "tiles": 4, "loads": "ahead", "maxnreg": 168}
METADATA: Final = tuned_files.metadata_for(H200, {}, "a test", "2026")


def config_of(knobs: Mapping[str, Any] = KNOBS, problem: DecodingProblem = STEP) -> Config:
    return default_config("recurrent", problem, arch=H200.arch).replace(**knobs)


def entry_of(programs: int = 4096, **changes: Any) -> DecodingEntry:
    found = DecodingEntry(
        at=decoding.known_of(STEP),
        programs=programs,
        knobs=KNOBS,
        template=tuned_files.digest_of(config_of()),
        measured={"us": 71.0, "rule_us": 90.0, "copy_us": 65.0},
        errors={"token: o": 1e-3},
    )
    return replace(found, **changes)


@pytest.fixture(name="path")
def _path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path))
    monkeypatch.setattr(decoding.paths, "packaged_tuned_dir", lambda: tmp_path / "packaged")
    return decoding_path(tmp_path, STEP.op, H200)


def _nearest(problem: DecodingProblem, programs: int, device: Device) -> Config | None:
    return next(nearest_of_each(problem, programs, device), None)


def test_calls_of_one_token_in_slots_run_what_is_near(path: Path) -> None:
    merge_decoding(path, METADATA, [entry_of(), entry_of(16, knobs={"BV": 8})])
    assert _nearest(STEP, 4096, H200) == config_of()
    assert _nearest(STEP, 2048, H200) == config_of()
    assert _nearest(STEP, 10**6, H200) == config_of(), "a GPU that is full is full"
    assert _nearest(STEP, 1000, H200) is None
    assert _nearest(STEP, 8, H200) == config_of({"BV": 8})
    for changes in (
        {"one_token": False}, {"indexed": False}, {"speculative": True}, {"state_bf16": False},
        {"state_v_first": False}, {"V": 64}, {"dtype": "fp16"}, {"op": "kda"},
    ):  # fmt: skip
        assert _nearest(replace(STEP, **changes), 4096, H200) is None, changes
    # what else is compiled in is not told apart
    assert _nearest(replace(STEP, l2norm=False, strided=True), 4096, H200) is not None
    assert _nearest(STEP, 4096, named_device("A100")) is None


def test_the_users_entries_come_before_the_packaged_ones(path: Path, tmp_path: Path) -> None:
    packaged = decoding_path(tmp_path / "packaged", STEP.op, H200)
    merge_decoding(packaged, METADATA, [entry_of(), entry_of(16)])
    assert _nearest(STEP, 4096, H200) == _nearest(STEP, 16, H200) == config_of()
    merge_decoding(path, METADATA, [entry_of(knobs={"BV": 32})])
    assert _nearest(STEP, 4096, H200) == config_of({"BV": 32})
    assert _nearest(STEP, 16, H200) == config_of()
    # what is compiled ahead has those of a machine without the user's files, too
    rule = runtime.by_rule(STEP, 256, 16, H200)
    both = (config_of({"BV": 32}), config_of(), rule)
    assert runtime.configs_at(STEP, 256, 16, H200) == both
    assert runtime.configs_at(replace(STEP, one_token=False), 256, 16, H200) == (rule,)


def test_configs_of_calls_and_what_they_depend_on(path: Path) -> None:
    """A plan that is known is of what was on file then; batches that may not matter have one."""
    before = runtime.surroundings()
    rule = runtime.config_at(STEP, 256, 16, H200)
    merge_decoding(path, METADATA, [entry_of(), entry_of(512, knobs={"loads": "ahead"})])
    assert runtime.surroundings() != before
    assert runtime.config_at(STEP, 256, 16, H200) == config_of() != rule
    with gdn2gen.batch_invariant():
        found = {runtime.config_at(STEP, n, 16, H200) for n in (1, 7, 256, 5000)}
    assert found == {config_of({"loads": "ahead"})}


def test_others_templates_and_knobs_are_passed_over(path: Path) -> None:
    merge_decoding(path, METADATA, [entry_of(template="0" * 16)])
    assert _nearest(STEP, 4096, H200) is None
    merge_decoding(path, METADATA, [entry_of(knobs={"BV": 12})])
    assert _nearest(STEP, 4096, H200) is None
    for name in ("other", "self"):
        merge_decoding(path, METADATA, [entry_of(knobs={"BV": 8, name: 1})])
        assert _nearest(STEP, 4096, H200) is None


def test_one_of_the_same_sizes_takes_the_place_of_the_other(path: Path) -> None:
    merge_decoding(path, METADATA, [entry_of(), entry_of(64)])
    merged = merge_decoding(path, METADATA, [entry_of(knobs={"BV": 16})])
    assert [(x.programs, x.knobs["BV"]) for x in merged] == [(4096, 16), (64, 8)]
    assert decoding.read_decoding(path) == merged
    with pytest.raises(StoreError, match=r"is of the GPU 'NVIDIA H200', but .* of 'other'"):
        merge_decoding(path, {**METADATA, "gpu": "other"}, [entry_of()])


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"schema": "parts-1"}, "has no schema decoding-1"),
        ({"entries": [{"at": {}}]}, "does not hold entries"),
        ({"entries": [{**vars(entry_of()), "programs": "many"}]}, "programs is 'many'"),
        ({"entries": [{**vars(entry_of()), "knobs": {"BV": 1.5}}]}, "neither a number nor a text"),
        ({"entries": [{**vars(entry_of()), "measured": {"us": 0}}]}, "us must be microseconds"),
        (
            {
                "entries": [
                    vars(entry_of(measured=dict.fromkeys(("us", "rule_us", "copy_us"), 10**400)))
                ]
            },
            "us must be microseconds",
        ),
        (
            {"entries": [vars(entry_of(measured={"us": 9.0, "rule_us": 90.0, "copy_us": 65.0}))]},
            "no step takes half of what a copy",
        ),
    ],
)
def test_what_is_no_such_file_is_refused_and_calls_run_the_rule(
    path: Path, broken: dict[str, Any], said: str
) -> None:
    path.parent.mkdir(parents=True)
    document = {**METADATA, "schema": decoding.DECODING_SCHEMA, "entries": [], **broken}
    path.write_text(json.dumps(document))
    with pytest.raises(StoreError, match=said):
        decoding.read_decoding(path)
    gdn2gen.reload()
    with pytest.warns(TunedFileWarning, match=said):
        found = runtime.config_at(STEP, 256, 16, H200)
    assert found == runtime.by_rule(STEP, 256, 16, H200)
    with pytest.raises(StoreError):
        merge_decoding(path, METADATA, [entry_of()])
