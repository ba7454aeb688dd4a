"""store.py: tuned files survive other processes, failed writes and files of another kind."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import warnings

import pytest

from gdn2gen.base.device import named_device
from gdn2gen.base.errors import StoreError, TunedFileWarning
from gdn2gen.base.paths import packaged_tuned_dir
from gdn2gen.cli import program
from gdn2gen.codegen import render
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.plans import plan_named, stages_of
from gdn2gen.kernels.stages import STAGES
from gdn2gen.store import format, sharing, tuned_files
from gdn2gen.store._claims import always_checked
from gdn2gen.store.dispatch import find_recipe
from gdn2gen.store.tuned_files import (
    Entry,
    TunedFile,
    is_stale,
    load_tuned,
    merge_entries,
    metadata_for,
    read_tuned,
    write_tuned,
)

CHECKED = always_checked("gdn2")
DEVICE = named_device("H200")
TOOLCHAIN = {"triton": "3.6.0", "torch": "2.11.0", "driver": "570.86.15"}
METADATA = metadata_for(DEVICE, TOOLCHAIN, "gdn2gen tune", "2026-01-02T03:04:05Z")


@pytest.fixture(autouse=True)
def digests(monkeypatch):
    monkeypatch.setattr(render, "template_digest", lambda config: f"d-{config.stage}")


def make_entry(tokens=16384, *, ms=2.5, problem=None, plan="lean", level="lean", **changes):
    problem = problem or Problem()
    stages = plan_named(plan).stages
    entry = Entry(
        problem_key=problem.key,
        regime_key=Regime(tokens, 4, 16).key,
        level=level,
        plan=plan,
        configs={stage: default_config(stage, problem) for stage in stages},
        templates={stage: f"d-{stage}" for stage in stages},
        measured={
            "n": 50,
            "forward_ms": 0.75,
            "forward_backward_ms": ms,
            "default_ms": 4.25,
            "spread": 0.01,
            "peak_mib": 812.5,
        },
        gate={**dict.fromkeys(CHECKED, 0.004), "o": 0.0031},
        provenance="measured",
    )
    return dataclasses.replace(entry, **changes)


def raw_of(path):
    return json.loads(path.read_text())


def test_round_trip(tmp_path):
    path = tmp_path / "gdn2" / "nvidia-h200.json"
    file = TunedFile(METADATA, (make_entry(1024), make_entry(2048, plan="fast", level="fast")))
    write_tuned(path, file)
    assert path == tuned_files.tuned_path(tmp_path, "gdn2", DEVICE)
    assert read_tuned(path, DEVICE) == file
    assert list(path.parent.iterdir()) == [path]


def test_bytes_are_stable_sorted_and_readable(tmp_path):
    entries = [
        make_entry(2048),
        make_entry(16384),
        make_entry(1024),
        make_entry(1024, level="fast"),
    ]
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    write_tuned(first, TunedFile(METADATA, tuple(entries)))
    shuffled = [
        dataclasses.replace(x, gate=dict(reversed(x.gate.items()))) for x in reversed(entries)
    ]
    metadata = dict(reversed(METADATA.items()))
    write_tuned(second, TunedFile(metadata, tuple(shuffled)))
    assert first.read_bytes() == second.read_bytes()
    write_tuned(second, read_tuned(first))
    assert first.read_bytes() == second.read_bytes()

    text = first.read_text()
    assert text.endswith("}\n")
    assert max(map(len, text.splitlines())) <= 140
    raw = raw_of(first)
    assert list(raw) == ["_metadata", "entries"]
    metadata_keys = ["schema", "gpu", "arch", "sms", "toolchain", "command", "date"]
    assert list(raw["_metadata"]) == metadata_keys
    assert list(raw["_metadata"]["toolchain"]) == ["driver", "torch", "triton"]
    assert [x["regime"]["tokens"] for x in raw["entries"]] == [1024, 1024, 2048, 16384]
    assert [x["level"] for x in raw["entries"]][:2] == ["fast", "lean"]
    assert list(raw["entries"][0]) == [
        "problem",
        "regime",
        "level",
        "plan",
        "configs",
        "templates",
        "measured",
        "gate",
        "provenance",
    ]
    assert '      "regime": {"tokens": 1024, "sequences": 4, "heads": 16},\n' in text
    assert '"measured": {"forward_ms": 0.75, "forward_backward_ms": 2.5, "default_ms"' in text
    assert '        "reprepare": {"BK": 64, "BT": 32,' in text


def test_no_entries(tmp_path):
    path = tmp_path / "x.json"
    write_tuned(path, TunedFile(METADATA, ()))
    assert read_tuned(path) == TunedFile(METADATA, ())


def test_entries_and_files_travel_between_processes():
    file = TunedFile(METADATA, (make_entry(),))
    assert pickle.loads(pickle.dumps(file)) == file


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "x.json"
    write_tuned(path, TunedFile(METADATA, (make_entry(),)))
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(
        StoreError, match=r"x\.json cannot be written .*No space.*GDN2GEN_TUNED_DIR"
    ):
        write_tuned(path, TunedFile(METADATA, (make_entry(ms=1.0),)))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_tuned(path, TunedFile(METADATA, (make_entry(),)))
    before = path.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_tuned(path, TunedFile(METADATA, ()))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "entry",
    [
        make_entry(provenance="guessed"),
        make_entry(plan="lean", configs={}),
        make_entry(measured={"forward_backward_ms": float("nan")}),
        make_entry(measured={"forward_backward_ms": -1.0}),
        make_entry(problem_key={"op": "gdn2"}),
        make_entry(gate={"o": float("inf")}),
        make_entry(
            configs={**make_entry().configs, "scan": default_config("scan", Problem(), BT=64)}
        ),
    ],
)
def test_nothing_invalid_is_written(tmp_path, entry):
    path = tmp_path / "x.json"
    with pytest.raises(StoreError):
        write_tuned(path, TunedFile(METADATA, (entry,)))
    with pytest.raises(StoreError):
        merge_entries(path, METADATA, [entry])
    assert not path.exists()


def test_metadata_that_could_not_be_read_is_not_written(tmp_path):
    for metadata in ({}, {**METADATA, "schema": 2}, {**METADATA, "sms": "132"}):
        with pytest.raises(StoreError, match="not written"):
            write_tuned(tmp_path / "x.json", TunedFile(metadata, ()))


def unusable(tmp_path, kind):
    """A file that must be ignored, and what the warning says of it."""
    path = tmp_path / "nvidia-h200.json"
    write_tuned(path, TunedFile(METADATA, (make_entry(),)))
    raw = raw_of(path)
    if kind == "truncated":
        path.write_text(path.read_text()[:-200])
        return path, "truncated or not JSON"
    if kind == "binary":
        path.write_bytes(b"\xff\xfe\x00")
        return path, "cannot be read as text"
    if kind == "nan":
        path.write_text(path.read_text().replace("812.5", "NaN"))
        return path, "NaN"
    if kind == "not-tuned":
        path.write_text("[1, 2]\n")
        return path, "not a tuned file"
    if kind == "schema":
        raw["_metadata"]["schema"] = 99
        reason = "schema is 99, but this gdn2gen reads 1"
    elif kind == "no-schema":
        del raw["_metadata"]["schema"]
        reason = "schema is None"
    elif kind == "no-entries":
        del raw["entries"]
        reason = "list of entries"
    path.write_text(json.dumps(raw))
    return path, reason


BROKEN = ("truncated", "binary", "nan", "not-tuned", "schema", "no-schema", "no-entries")


@pytest.mark.parametrize("kind", BROKEN)
def test_an_unusable_file_is_ignored_with_a_warning(tmp_path, kind):
    path, reason = unusable(tmp_path, kind)
    before = path.read_bytes()
    with pytest.warns(TunedFileWarning) as caught:
        assert read_tuned(path, DEVICE) is None
    (message,) = [str(x.message) for x in caught]
    assert str(path) in message
    assert reason in message
    assert "gdn2gen tune" in message
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", BROKEN)
def test_an_unusable_file_is_never_overwritten(tmp_path, kind):
    path, reason = unusable(tmp_path, kind)
    before = path.read_bytes()
    with pytest.raises(StoreError) as caught:
        merge_entries(path, METADATA, [make_entry(ms=0.5)])
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)
    assert "move it away" in str(caught.value)
    assert path.read_bytes() == before


def test_file_of_another_gpu(tmp_path):
    path = tmp_path / "nvidia-h200.json"
    metadata = metadata_for(named_device("H100"), TOOLCHAIN, "gdn2gen tune")
    write_tuned(path, TunedFile(metadata, (make_entry(),)))
    before = path.read_bytes()
    with pytest.warns(TunedFileWarning, match=r"'NVIDIA H100 80GB HBM3', but 'NVIDIA H200'"):
        assert read_tuned(path, DEVICE) is None
    with pytest.raises(StoreError, match="'NVIDIA H100 80GB HBM3'"):
        merge_entries(path, METADATA, [make_entry()])
    assert path.read_bytes() == before
    assert read_tuned(path) is not None


def test_no_file_is_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_tuned(tmp_path / "none.json", DEVICE) is None


def test_a_folder_in_place_of_a_file_is_a_warning(tmp_path):
    with pytest.warns(TunedFileWarning, match="cannot be read"):
        assert read_tuned(tmp_path) is None


def change(raw, *place, value):
    for name in place[:-1]:
        raw = raw[name]
    if value is None:
        del raw[place[-1]]
    else:
        raw[place[-1]] = value


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("configs", "scan", "warp_speed"), 9, "warp_speed"),
        (("configs", "scan", "BV"), 48, "scan.BV must be one of"),
        (("configs", "scan", "BV"), 32.0, "scan.BV must be an integer or a text"),
        (("configs", "scan", "BV"), None, "scan takes the knobs"),
        (("configs", "teleport"), {"BT": 64}, "unknown stage 'teleport'"),
        (("configs", "scan"), None, "plan 'lean' has the stages"),
        (("configs", "scan", "BT"), 64, "share BT"),
        (("plan",), "clever", "plan must be one of"),
        (("level",), "huge", "level must be one of"),
        (("provenance",), "rumour", "provenance must be one of"),
        (("problem", "K"), 50, "head dim K=50"),
        (("problem", "l2norm"), 1, "problem.l2norm must be of bool"),
        (("regime", "tokens"), "many", "regime.tokens must be of int"),
        (("regime", "tokens"), -1, "must be 0 or more"),
        (("measured", "forward_backward_ms"), "fast", "measured.forward_backward_ms"),
        (("measured",), [], "measured must be a dict"),
        (("templates", "teleport"), "abc", "unknown stages ['teleport']"),
        (("gate",), None, "lacks the keys ['gate']"),
        (("colour",), "red", "unknown ones ['colour']"),
    ],
)
def test_an_entry_that_cannot_be_used_is_skipped_and_kept(tmp_path, place, value, reason):
    path = tmp_path / "x.json"
    write_tuned(path, TunedFile(METADATA, (make_entry(1024), make_entry(2048))))
    raw = raw_of(path)
    change(raw["entries"][1], *place, value=value)
    path.write_text(json.dumps(raw))
    with pytest.warns(TunedFileWarning) as caught:
        file = read_tuned(path, DEVICE)
    (message,) = [str(x.message) for x in caught]
    assert f"entry 1 of the tuned file {path} is skipped" in message
    assert reason in message
    assert file.entries == (make_entry(1024),)
    merge_entries(path, METADATA, [make_entry(4096)])
    assert raw["entries"][1] in raw_of(path)["entries"]
    assert len(load_tuned(path).entries) == 2


def test_entries_skipped_for_one_reason_share_a_warning(tmp_path):
    path = tmp_path / "x.json"
    write_tuned(path, TunedFile(METADATA, (make_entry(1024), make_entry(2048), make_entry(4096))))
    raw = raw_of(path)
    for position in (0, 2):
        change(raw["entries"][position], "templates", "teleport", value="abc")
    path.write_text(json.dumps(raw))
    with pytest.warns(TunedFileWarning) as caught:
        read_tuned(path, DEVICE)
    (message,) = [str(x.message) for x in caught]
    assert f"entries 0, 2 of the tuned file {path} are skipped: templates name" in message


def test_a_new_entry_replaces_one_that_cannot_be_read(tmp_path):
    path = tmp_path / "x.json"
    write_tuned(path, TunedFile(METADATA, (make_entry(1024),)))
    path.write_text(path.read_text().replace('"reprepare": {"BK": 64', '"reprepare": {"BK": 33'))
    assert load_tuned(path).unread
    merge_entries(path, METADATA, [make_entry(1024, ms=9.0)])
    assert load_tuned(path) == TunedFile(METADATA, (make_entry(1024, ms=9.0),))


def test_entries_filed_before_a_knob_came_are_read(tmp_path):
    path = tmp_path / "x.json"
    entries = (make_entry(1024, plan="fast", level="fast"), make_entry(1024))
    write_tuned(path, TunedFile(METADATA, entries))
    raw = json.loads(path.read_text())
    served = stages_of("gdn2")
    later = {x.name: x.later for x in STAGES.values() if x.later and x.name in served}
    met = set()
    for entry in raw["entries"]:
        for stage in later.keys() & entry["configs"].keys():
            met.add(stage)
            for knob, value in later[stage].items():
                assert entry["configs"][stage].pop(knob) == value
    assert met == {*later}
    path.write_text(json.dumps(raw))
    assert load_tuned(path).entries == entries


def test_merge_keeps_the_faster(tmp_path):
    path = tmp_path / "gdn2" / "x.json"
    merge_entries(path, METADATA, [make_entry(ms=2.5), make_entry(1024)])
    before = path.read_bytes(), path.stat().st_mtime_ns
    later = {**METADATA, "date": "2027-01-01T00:00:00Z"}
    file = merge_entries(path, later, [make_entry(ms=3.0)])
    assert file.metadata["date"] == METADATA["date"]
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    file = merge_entries(path, later, [make_entry(ms=2.0)])
    assert file == read_tuned(path)
    assert file.metadata["date"] == later["date"]
    assert [x.measured["forward_backward_ms"] for x in file.entries] == [2.5, 2.0]
    merge_entries(path, later, [make_entry(ms=9.0, level="fast")])
    assert len(read_tuned(path).entries) == 3


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("worse", "better"),
    [
        (make_entry(measured={}, provenance="predicted"), make_entry(ms=5.0)),
        (make_entry(ms=1.0, provenance="transferred"), make_entry(ms=5.0)),
        (
            make_entry(measured={}, provenance="predicted"),
            make_entry(ms=5.0, provenance="transferred"),
        ),
        (make_entry(ms=1.0, templates={"prepare": "old"}), make_entry(ms=5.0)),
        (make_entry(ms=2.0), make_entry(ms=1.0)),
    ],
)
def test_merge_prefers(tmp_path, first, worse, better):
    path = tmp_path / "x.json"
    pair = (worse, better)
    merge_entries(path, METADATA, [pair[first]])
    merge_entries(path, METADATA, [pair[1 - first]])
    assert read_tuned(path).entries == (better,)


# At 16384 tokens, 16 heads and K = V = 128 both directions move 1.54 GB, of which an L2 might save
# 0.26: 0.22 ms on an H200 whose memory were clocked up.
CLAIMS = {
    "no time": ({"measured": {}}, "no forward_backward_ms"),
    "nothing takes no time": ({"ms": 1e-300}, "measured.forward_backward_ms is 1e-300 ms, but"),
    "below the floor": ({"ms": 0.15}, "forward_backward_ms is 0.15 ms, but NVIDIA H200 takes 0.2"),
    "default below": ({"measured": {"forward_backward_ms": 2.0, "default_ms": 1e-3}}, "default_ms"),
    "text": ({"measured": {"forward_backward_ms": "2.5"}}, "milliseconds above 0, but is '2.5'"),
    "no errors": ({"gate": {}}, "lacks those of ['o', 'dq', 'dk', 'dv', 'dg', 'db', 'dw']"),
    "one error left out": (
        {"gate": dict.fromkeys(CHECKED[:-1], 1e-3)},
        "lacks those of ['dw']",
    ),
    "above the bound": (
        {"gate": dict.fromkeys(CHECKED, 1e-3) | {"o": 5.0}},
        "has o 5.0",
    ),
    "just above": (
        {"gate": dict.fromkeys(CHECKED, 1e-3) | {"dg": 0.0301}},
        "at most 0.03 for",
    ),
    "below zero": (
        {"gate": dict.fromkeys(CHECKED, 1e-3) | {"o": -1e-3}},
        "has o -0.001",
    ),
    "no number": (
        {"gate": dict.fromkeys(CHECKED, 1e-3) | {"dq": "0"}},
        "has dq '0'",
    ),
    "timed, yet predicted": ({"provenance": "predicted"}, "predicted, so nothing was timed"),
    "unlisted GPU": ({"ms": 0.01, "gpu": "NVIDIA X1"}, "NVIDIA X1 takes"),
}


@pytest.mark.parametrize(("changes", "words"), CLAIMS.values(), ids=CLAIMS)
def test_what_cannot_be_true_is_refused_wherever_it_comes_in(tmp_path, monkeypatch, changes, words):
    """Merged, it would have taken the place of what was measured."""
    changes = dict(changes)
    device = dataclasses.replace(DEVICE, name=changes.pop("gpu", DEVICE.name))
    metadata = metadata_for(device, TOOLCHAIN, "gdn2gen tune")
    good, lying = make_entry(), make_entry(**changes)
    path = tmp_path / "gdn2" / f"{DEVICE.slug}.json"
    write_tuned(path, TunedFile(metadata, (good,)))
    before = path.read_bytes()
    for write in (
        lambda: merge_entries(path, metadata, [lying]),
        lambda: write_tuned(path, TunedFile(metadata, (lying,))),
        lambda: tuned_files.amend_entries(path, [(good, lying)]),
    ):
        with pytest.raises(StoreError) as raised:
            write()
        assert words in str(raised.value)
        assert path.read_bytes() == before
    theirs = tmp_path / "theirs.json"
    theirs.write_text(format.format_file(TunedFile(metadata, (lying,))))
    with pytest.warns(TunedFileWarning) as warned:
        assert program.main(["tuned", "merge", str(theirs), "--to", str(path)]) == 0
    assert words in str(warned[0].message) and "entry 0 of the tuned file" in str(warned[0].message)
    assert path.read_bytes() == before
    theirs.rename(path)  # by hand
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path))
    monkeypatch.setattr("gdn2gen.base.paths.packaged_tuned_dir", lambda: tmp_path / "none")
    with pytest.warns(TunedFileWarning) as warned:
        found = find_recipe(Problem(), lying.regime, device)
    assert words in str(warned[0].message)
    assert found.source == "default"


def test_what_can_be_true_is_believed(tmp_path):
    path = tmp_path / "x.json"
    for entry in (
        make_entry(ms=0.3),  # an L2 that holds all that it may
        make_entry(8, ms=1e-3, measured={"forward_backward_ms": 1e-4}),
        make_entry(gate=dict.fromkeys(CHECKED, 0.0299)),
        make_entry(measured={"predicted_bytes": 7}, gate={}, provenance="predicted"),
        make_entry(ms=0.01, provenance="transferred"),
    ):
        write_tuned(path, TunedFile(METADATA, (entry,)))
        assert read_tuned(path).entries == (entry,)
    gated = Problem(gate="softplus", has_A_log=True)
    errors = dict.fromkeys(CHECKED, 4e-3) | {"dA_log": 0.08, "ddt_bias": 0.01}
    write_tuned(path, TunedFile(METADATA, (make_entry(problem=gated, gate=errors),)))


def test_what_is_packaged_is_believed():
    paths = sorted(packaged_tuned_dir().glob("*/*.json"))
    assert paths
    for path in paths:
        file = tuned_files.load_tuned(path)
        assert file.entries and not file.unread


def _in_tilelang(ms, **changes):
    configs = {**make_entry().configs}
    configs["scan"] = configs["scan"].replace(language="tilelang")
    return make_entry(ms=ms, configs=configs, **changes)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("tilelang", "alone", "kept"),
    [
        (_in_tilelang(1.5), make_entry(ms=2.0), (0, 1)),
        (_in_tilelang(2.5), make_entry(ms=2.0), (1,)),
        (_in_tilelang(2.0), make_entry(ms=2.0), (1,)),
        (_in_tilelang(1.5), make_entry(ms=2.0, provenance="transferred"), (0,)),
        (_in_tilelang(1.5, provenance="transferred"), make_entry(ms=2.0), (1,)),
        (_in_tilelang(1.5), make_entry(ms=2.0, templates={}), (0,)),
        (_in_tilelang(1.5, templates={}), make_entry(ms=2.0), (1,)),
    ],
)
def test_what_needs_triton_alone_stays_beside_what_is_faster(
    tmp_path, order, tilelang, alone, kept
):
    path = tmp_path / "x.json"
    pair = (tilelang, alone)
    for entry in pair[::order]:
        merge_entries(path, METADATA, [entry])
    assert read_tuned(path).entries == tuple(pair[x] for x in kept)
    others = tuned_files.stand_ins(pair[x] for x in kept)
    assert others == ({alone.key: "Triton alone"} if len(kept) == 2 else {})
    merge_entries(path, METADATA, [make_entry(ms=1.75)])
    times = [x.measured["forward_backward_ms"] for x in read_tuned(path).entries]
    assert times == ([1.5, 1.75] if 0 in kept else [1.75])


def _refusing(ms, **changes):
    """Its scan is parallel: packed sequences are none of its."""
    configs = {**make_entry().configs}
    configs["scan"] = configs["scan"].replace(segments="parallel", **changes.pop("knobs", {}))
    return make_entry(ms=ms, configs=configs, **changes)


_FEW = _refusing(1.2, knobs={"language": "tilelang", "BV": 64})


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("entries", "kept", "others"),
    [
        ((_FEW, _in_tilelang(1.5), make_entry(ms=2.0)), (0, 1, 2),
         {1: "every option", 2: "Triton alone"}),
        ((_FEW, make_entry(ms=2.0)), (0, 1), {1: "Triton alone, every option"}),
        ((_FEW, _in_tilelang(1.5), _refusing(1.8), make_entry(ms=2.0)), (0, 1, 2, 3),
         {1: "every option", 2: "Triton alone", 3: ""}),
        # one that serves as much and is no slower leaves no use for another
        ((_FEW, _in_tilelang(1.2), make_entry(ms=2.0)), (1, 2), {2: "Triton alone"}),
        ((_FEW, _in_tilelang(1.5), make_entry(ms=1.4)), (0, 2), {2: "Triton alone, every option"}),
        ((_FEW, _in_tilelang(1.5), make_entry(ms=1.1)), (2,), {}),
        ((_FEW, _in_tilelang(1.5), _refusing(1.1)), (2, 1), {1: "every option"}),
        # nor does one that calls pass over, beside one that they do not
        ((_FEW, _in_tilelang(1.5, templates={})), (0,), {}),
        ((dataclasses.replace(_FEW, templates={}), _in_tilelang(1.5)), (1,), {}),
        ((_FEW, _in_tilelang(1.5, provenance="transferred")), (0,), {}),
    ],
)  # fmt: skip
def test_what_serves_every_option_stays_beside_what_is_faster(
    tmp_path, order, entries, kept, others
):
    path = tmp_path / "x.json"
    for entry in entries[::order]:
        merge_entries(path, METADATA, [entry])
    found = read_tuned(path).entries
    assert {x.key: x for x in found} == {entries[x].key: entries[x] for x in kept}
    assert list(found) == sorted(found, key=lambda x: x.key)
    assert tuned_files.stand_ins(found) == {entries[x].key: y for x, y in others.items()}
    text = path.read_bytes()
    write_tuned(path, read_tuned(path))
    assert path.read_bytes() == text and b"option" not in text  # it is not said, it follows


def test_what_an_entry_serves_is_told_by_its_label():
    assert "options=some level=lean" in _FEW.label
    assert "options" not in _in_tilelang(1.0).label
    assert "language=triton options=some level=lean" in _refusing(1.0).label
    assert len({x.key for x in (_FEW, _in_tilelang(1.0), _refusing(1.0), make_entry())}) == 4


def test_an_entry_that_cannot_be_read_gives_way_whatever_options_it_served(tmp_path):
    path = tmp_path / "x.json"
    write_tuned(path, TunedFile(METADATA, (_FEW,)))
    raw = json.loads(path.read_text())
    raw["entries"][0]["plan"] = "of a newer version"
    path.write_text(json.dumps(raw))
    assert len(merge_entries(path, METADATA, [make_entry()]).unread) == 1  # in Triton alone
    assert not merge_entries(path, METADATA, [_in_tilelang(1.0)]).unread


def test_what_is_exported_is_what_calls_find(tmp_path, monkeypatch):
    """The user's entries, and packaged ones that serve more, or are less stale."""
    user, packaged = tmp_path / "user", tmp_path / "packaged"
    monkeypatch.setattr(sharing, "user_tuned_dir", lambda: user)
    monkeypatch.setattr(sharing, "packaged_tuned_dir", lambda: packaged)

    def exported(mine, theirs):
        for folder, entries in ((user, mine), (packaged, theirs)):
            path = tuned_files.tuned_path(folder, "gdn2", DEVICE)
            write_tuned(path, TunedFile(METADATA, tuple(entries)))
        return [x.measured["forward_backward_ms"] for x in sharing.on_file("gdn2", DEVICE).entries]

    wide, alone = _in_tilelang(1.5), make_entry(ms=2.0)
    assert exported([], [_FEW, wide, alone]) == [1.2, 1.5, 2.0]
    assert exported([_in_tilelang(1.7)], [_FEW, wide, alone]) == [1.7, 2.0]
    assert exported([_refusing(1.3, knobs={"language": "tilelang", "BV": 64})], [_FEW, wide]) == [
        1.3,
        1.5,
    ]
    stale = dataclasses.replace(_in_tilelang(1.7), templates={})
    assert exported([stale], [_FEW, wide, alone]) == [1.2, 1.5, 2.0]
    assert exported([_FEW, stale], [alone]) == [1.2, 2.0]
    assert exported([_FEW, stale], []) == [1.2, 1.7]


def test_a_difference_is_told_where_the_other_file_serves_other_options():
    old = TunedFile(METADATA, (_in_tilelang(1.5), make_entry(ms=2.0)))
    new = TunedFile(METADATA, (_FEW, make_entry(ms=2.0)))
    (found,) = sharing.diff(old, new)
    assert found.times == (1.5, 1.2) and "scan.segments" in found.knobs
    (back,) = sharing.diff(new, old)
    assert back.ratio == 1.5 / 1.2
    both = TunedFile(METADATA, (_FEW, _in_tilelang(1.5), make_entry(ms=2.0)))
    (found,) = sharing.diff(old, both)
    assert (found.old, found.new) == (None, _FEW)
    assert not sharing.diff(both, both)


def test_is_stale(monkeypatch):
    entry = make_entry()
    assert not is_stale(entry)
    assert is_stale(make_entry(templates={}))
    monkeypatch.setattr(render, "template_digest", lambda config: config.stage.replace("scan", "x"))
    assert tuned_files.stale_stages(entry) == list(plan_named("lean").stages)

    def missing(config):
        raise FileNotFoundError(config.stage)

    monkeypatch.setattr(render, "template_digest", missing)
    assert is_stale(entry)


def _merge_many(path, worker):
    for i in range(6):
        own = make_entry(1000 * (worker + 1) + i, ms=1.0 + i, templates={})
        shared = make_entry(7, ms=10.0 - worker - i / 10, templates={})
        merge_entries(path, METADATA, [own, shared])


def test_four_processes_lose_nothing(tmp_path):
    path = tmp_path / "gdn2" / "nvidia-h200.json"
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=_merge_many, args=(path, n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    found = {x.regime.tokens: x for x in read_tuned(path, DEVICE).entries}
    assert set(found) == {7, *(1000 * (n + 1) + i for n in range(4) for i in range(6))}
    assert found[7].measured["forward_backward_ms"] == 6.5
    assert {x.name for x in path.parent.iterdir()} == {path.name, f"{path.name}.lock"}


def test_symlinked_file_is_written_through(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    write_tuned(real, TunedFile(METADATA, ()))
    link.symlink_to(real)
    merge_entries(link, METADATA, [make_entry()])
    assert link.is_symlink()
    assert len(read_tuned(real).entries) == 1
