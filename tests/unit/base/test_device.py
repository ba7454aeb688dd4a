"""device.py: the table of named GPUs, and the present GPU, asked lazily."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from gdn2gen.base import device
from gdn2gen.base.device import (
    Device,
    has_gpu,
    known_device,
    named_device,
    present_device,
    toolchain,
)
from gdn2gen.base.errors import DeviceError

KIB = 1024


@pytest.fixture(autouse=True)
def forget():
    device._device_at.cache_clear()
    yield
    device._device_at.cache_clear()


def pretend(monkeypatch, name="NVIDIA H200", major=9, minor=0, sms=132, shared=227 * KIB):
    """Make torch see one GPU; returns the list of the indices that were asked for."""
    asked = []

    def properties(index):
        asked.append(index)
        return SimpleNamespace(
            name=name,
            major=major,
            minor=minor,
            multi_processor_count=sms,
            shared_memory_per_block_optin=shared,
        )

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    return asked


def test_present_device_is_described_once(monkeypatch):
    asked = pretend(monkeypatch)
    expected = Device("NVIDIA H200", "nvidia-h200", "sm_90", 132, 227 * KIB, 4800.0)
    assert present_device() == expected
    assert present_device(0) is present_device()
    assert asked == [0]
    assert expected == named_device("H200")


def test_unknown_present_gpu_has_no_bandwidth(monkeypatch):
    pretend(monkeypatch, "NVIDIA H200 MIG 1g.18gb", sms=16)
    found = present_device()
    assert found.slug == "nvidia-h200-mig-1g-18gb"
    assert (found.sms, found.memory_gbps) == (16, None)


def test_no_gpu_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert not has_gpu()
    for ask in (present_device, lambda: present_device(0)):
        with pytest.raises(DeviceError, match=r"no GPU is present.*takes a named GPU instead"):
            ask()


def test_gpu_of_another_maker_is_no_gpu(monkeypatch):
    pretend(monkeypatch)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert not has_gpu()
    with pytest.raises(DeviceError, match="AMD"):
        present_device()


def test_index_out_of_range(monkeypatch):
    pretend(monkeypatch)
    with pytest.raises(DeviceError, match=r"number 3 .* torch sees 1"):
        present_device(3)


@pytest.mark.parametrize(
    ("name", "slug", "arch"),
    [
        ("H200", "nvidia-h200", "sm_90"),
        ("nvidia-h200", "nvidia-h200", "sm_90"),
        ("NVIDIA H200", "nvidia-h200", "sm_90"),
        ("H100", "nvidia-h100-80gb-hbm3", "sm_90"),
        ("h100 pcie", "nvidia-h100-pcie", "sm_90"),
        ("GH200", "nvidia-gh200-480gb", "sm_90"),
        ("A100", "nvidia-a100-sxm4-80gb", "sm_80"),
        ("A10", "nvidia-a10", "sm_86"),
        ("L4", "nvidia-l4", "sm_89"),
        ("L40S", "nvidia-l40s", "sm_89"),
        ("RTX 3090", "nvidia-geforce-rtx-3090", "sm_86"),
        ("rtx4090", "nvidia-geforce-rtx-4090", "sm_89"),
        ("GeForce RTX 5090", "nvidia-geforce-rtx-5090", "sm_120"),
        ("B200", "nvidia-b200", "sm_100"),
        (
            "RTX PRO 6000 Blackwell",
            "nvidia-rtx-pro-6000-blackwell-workstation-edition",
            "sm_120",
        ),
        ("sm_90", "sm_90", "sm_90"),
        ("SM100", "sm_100", "sm_100"),
    ],
)
def test_named_device(name, slug, arch):
    found = named_device(name)
    assert (found.slug, found.arch) == (slug, arch)
    assert named_device(found.slug) == named_device(found.name) == found


@pytest.mark.parametrize(
    ("name", "kib"),
    [("sm_80", 163), ("sm_86", 99), ("sm_89", 99), ("sm_90", 227), ("sm_100", 227), ("sm_120", 99)],
)
def test_bare_targets(name, kib):
    found = named_device(name)
    assert found.arch == found.name == name
    assert found.shared_bytes == kib * KIB
    assert found.sms > 0
    assert found.memory_gbps is None


def test_unknown_name_lists_what_is_known():
    with pytest.raises(DeviceError, match=r"unknown GPU 'H300'; did you mean .*nvidia-h200.*sm_90"):
        named_device("H300")
    with pytest.raises(DeviceError, match=r"unknown GPU ''\. Give"):
        named_device("")
    assert known_device("H300") is None


def test_other_names_are_unambiguous():
    names = [device._loose(x) for gpu in device._GPUS for x in (gpu[0], *gpu[4])]
    assert len(set(names)) == len(names)
    assert len(device._by_slug()) == len(device._GPUS)


def test_device_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        named_device("H200").sms = 1


def test_toolchain_names_versions():
    found = toolchain()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["python"] == sys.version.split()[0]
    assert all(isinstance(value, str) and value for value in found.values())
    found["torch"] = "changed"
    assert toolchain()["torch"] != "changed"


def test_driver_version_from_both_kinds_of_module(monkeypatch, tmp_path):
    for text in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build",
    ):
        monkeypatch.setattr(device.Path, "read_text", lambda self, text=text: text)
        assert device._driver_version() == "570.86.15"


def test_import_queries_no_gpu_and_imports_no_compiler():
    """Nor does that of the tuner query one, whose imports come last."""
    code = (
        "import sys, gdn2gen.base.device, gdn2gen.store.tuned_files, gdn2gen.store.dispatch\n"
        "gdn2gen.base.device.named_device('H200'); gdn2gen.base.device.toolchain()\n"
        "bad = {'triton', 'tilelang', 'optuna'} & set(sys.modules)\n"
        "assert not bad, bad\n"
        "import gdn2gen.tuning.run, torch; assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
