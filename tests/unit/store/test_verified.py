"""What has passed where: read, filed, and asked for by calls."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gdn2gen.base.device import Device, named_device
from gdn2gen.base.errors import StoreError, TunedFileWarning, UnsupportedError
from gdn2gen.family.problem import USUAL_DIMS
from gdn2gen.family.registry import OPS
from gdn2gen.runtime import head_dims
from gdn2gen.store import verified
from gdn2gen.store.verified import Place

A100 = named_device("a100-sxm4-80gb")
CUDA = torch.device("cuda:0")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path))
    verified.look_anew()
    yield tmp_path
    verified.look_anew()


def file_some(
    folder: Path, device: Device = A100, *found: Place, failed: tuple[Place, ...] = ()
) -> Path:
    some = found or (Place("gdn2", "bf16", 72, 72), Place("gdn2", "fp16", 72, 72))
    return verified.file_found(
        folder, some, failed, device, command="gdn2gen verify", toolchain={"torch": "2.11.0"}
    )


def test_what_ships(own: Path) -> None:
    for op in OPS[:2]:
        for K in USUAL_DIMS:
            assert verified.is_verified(op, "bf16", K, K, "sm_90")
    assert verified.is_verified("gdn2", "bf16", 256, 512, "sm_90")
    assert not verified.is_verified("gdn2", "fp16", 256, 512, "sm_90")
    assert not verified.is_verified("gdn2", "bf16", 128, 128, "sm_80")
    assert verified.archs_of("gdn2", "bf16", 128, 128) == ("sm_90",)


def test_what_passes_is_remembered_for_its_architecture(own: Path) -> None:
    assert not verified.is_verified("gdn2", "bf16", 72, 72, "sm_80")
    file_some(own)
    assert verified.is_verified("gdn2", "bf16", 72, 72, "sm_80")
    assert not verified.is_verified("gdn2", "fp32", 72, 72, "sm_80")
    assert not verified.is_verified("kda", "bf16", 72, 72, "sm_80")
    assert not verified.is_verified("gdn2", "bf16", 72, 72, "sm_86")


def test_a_newer_run_replaces_what_an_older_one_says_of_the_same(own: Path) -> None:
    file_some(own, A100, Place("gdn2", "bf16", 72, 72), Place("gdn2", "bf16", 80, 80))
    path = file_some(own, A100, Place("gdn2", "bf16", 72, 72))
    runs = json.loads(path.read_text())["runs"]
    assert sorted(run["dims"] for run in runs) == [[[72, 72]], [[80, 80]]]


def test_what_fails_there_no_longer_counts(own: Path) -> None:
    """Whether it had passed there, or ships as passed."""
    H200 = named_device("H200")
    places = Place("gdn2", "bf16", 72, 72), Place("kda", "bf16", 128, 128)
    assert all(verified.is_verified(*x, "sm_90") for x in places)
    file_some(own, H200, failed=places)
    assert not any(verified.is_verified(*x, "sm_90") for x in places)
    # a few cases that pass clear nothing that more of them found
    settings = {"command": "gdn2gen verify", "toolchain": {"torch": "2.11.0"}}
    verified.file_found(own, places, (), H200, **settings, few=places[:1])
    assert [verified.is_verified(*x, "sm_90") for x in places] == [False, True]
    file_some(own, H200, *places)
    assert all(verified.is_verified(*x, "sm_90") for x in places)


def test_processes_that_file_at_once_lose_nothing(own: Path) -> None:
    code = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_verified import A100, Place, file_some
for size in range(16, 112, 8):
    file_some(Path(sys.argv[1]), A100, Place("gdn2", sys.argv[2], size, 16))
"""
    here = str(Path(__file__).parent)
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(own), dtype, here])
        for dtype in ("bf16", "fp16")
    ]
    assert [x.wait(60) for x in running] == [0, 0]
    runs = json.loads((own / verified.NAME).read_text())["runs"]
    assert sum(len(run["dims"]) for run in runs) == 24


def test_another_version_has_passed_nothing(own: Path) -> None:
    path = file_some(own)
    path.write_text(path.read_text().replace(f'"{verified.__version__}"', '"0.0.9"'))
    verified.look_anew()
    assert not verified.is_verified("gdn2", "bf16", 72, 72, "sm_80")
    assert verified.other_versions(Place("gdn2", "bf16", 72, 72), "sm_80") == ["0.0.9"]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"schema": 2, "runs": []}', '{"schema": 1, "runs": 3}']
)
def test_a_damaged_file_is_named_and_neither_used_nor_replaced(own: Path, text: str) -> None:
    path = own / verified.NAME
    path.write_text(text)
    with pytest.warns(TunedFileWarning, match="is ignored"):
        assert not verified.is_verified("gdn2", "bf16", 72, 72, "sm_80")
    for file in (file_some, verified.check_fileable):
        with pytest.raises(StoreError, match="not changed"):
            file(own)
    assert path.read_text() == text


def test_a_call_on_another_architecture_says_what_verifies(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GDN2GEN_UNVERIFIED", raising=False)
    monkeypatch.setattr(head_dims, "_arch", lambda device: "sm_80")

    def call(**changes: Any) -> tuple[int, int]:
        given = {"op": "gdn2", "dtype": torch.bfloat16, "device": CUDA, "K": 72, "V": 72}
        return head_dims.check_head_dims(**given | changes)

    for size in (72, 128):
        with pytest.raises(UnsupportedError) as raised:
            call(K=size, V=size)
        assert "were not verified on a GPU of sm_80 (they were on sm_90)" in str(raised.value)
        assert f"gdn2gen verify --op gdn2 --head-dim {size},{size}" in str(raised.value)
    file_some(own)
    assert call() == (72, 72)
    with pytest.raises(UnsupportedError, match="in fp32"):
        call(dtype=torch.float32)
    monkeypatch.setenv("GDN2GEN_UNVERIFIED", "1")
    with pytest.warns(UserWarning, match="GDN2GEN_UNVERIFIED=1 uses them"):
        assert call(K=128, V=64) == (128, 64)
