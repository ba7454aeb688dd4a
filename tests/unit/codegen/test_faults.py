"""What compilers are known to get wrong is found in what they made, and what is right passes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gdn2gen.base.device import named_device
from gdn2gen.base.errors import BuildError
from gdn2gen.codegen import build
from gdn2gen.codegen.faults import lost_descriptor, mixed_halves, why_wrong
from gdn2gen.codegen.render import render
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.validity import why_invalid

# Of a fold_kernel in chunks of 16: 1024 threads times 2**28 leave the lower 32 bits.
OVERFLOWS = """
    mul.wide.u32 	%rd33, %r2, 268435456;
    cvt.u64.u32 	%rd34, %r2;
    shl.b64 	%rd35, %rd34, 33;
    or.b64 	%rd36, %rd33, %rd35;
"""


def _sass(*lines: str) -> str:
    """As nvdisasm writes it."""
    return "\n".join(
        line if line.startswith(".L") else f"        /*{16 * i:04x}*/       {line} ;"
        for i, line in enumerate(lines)
    )


UNWRITTEN = _sass(
    "USGXT.U32 UR5, UR8, 0xe",
    "UIADD3 UR8, UP0, UR60, 0x20, URZ",
    "ULDC.64 UR10, c[0x0][0x210]",
    "UIADD3.X UR9, UR60, -0x3ffffff0, URZ, UP0, !UPT",
)
ITSELF = _sass(
    "ULDC.64 UR12, c[0x0][0x210]",
    "UIADD3 UR14, UP0, UR14, 0x2, URZ",
    "UIADD3.X UR15, UR15, -0x7fffffe0, URZ, UP0, !UPT",
)
THREAD = _sass(
    "S2R R0, SR_TID.X",
    "IADD3 R25, P2, R0.reuse, 0x40, RZ",
    "IADD3.X R27, R0, -0x7fffffe0, RZ, P2, !PT",
)
# The same register, but another value.
CLEARED = _sass(
    "USGXT.U32 UR7, UR7, 0xe",
    "UIADD3 UR10, UP0, UR7, 0x2000080, URZ",
    "UMOV UR7, URZ",
    "UIADD3.X UR11, UR7, 0x40000040, URZ, UP0, !UPT",
)
# Written on one of two ways, and on the way round a loop.
ONE_WAY = _sass(
    "@P0 BRA `(.L_x_1)",
    "UMOV UR4, 0x400",
    "UMOV UR5, URZ",
    ".L_x_1:",
    "UIADD3 UR10, UP0, UR4, 0x2, URZ",
    "UIADD3.X UR11, UR5, 0x40000040, URZ, UP0, !UPT",
)
ROUND = _sass(
    ".L_x_1:",
    "UIADD3 UR10, UP0, UR4, 0x2, URZ",
    "UIADD3.X UR11, UR5, 0x40000040, URZ, UP0, !UPT",
    "UMOV UR4, UR8",
    "UMOV UR5, URZ",
    "@P0 BRA `(.L_x_1)",
    "EXIT",
)
# Both hold something else after a branch: mamba3_gradient with P = 96.
HELD = _sass(
    "ULDC UR14, c[0x0][0x2ec]",
    "USHF.R.U32.HI UR15, URZ, 0x1, UR47",
    "@P0 BRA `(.L_x_1)",
    "UMOV UR14, 0x400",
    "UMOV UR15, URZ",
    "EXIT",
    ".L_x_1:",
    "UIADD3 UR14, UP1, UR14, 0x40, URZ",
    "UIADD3.X UR15, UR15, -0x7fffffe0, URZ, UP1, !UPT",
)
# Pairs whose upper half is no descriptor's: an address, and one that goes back.
ADDRESS = _sass("IADD3 R2, P0, R4, 0x40, RZ", "IADD3.X R3, R4, 0x1, RZ, P0, !PT")
BACK = _sass(
    "SHF.R.S32.HI R4, RZ, 0x1f, R3",
    "IADD3 R2, P0, R3, -0x40, RZ",
    "IADD3.X R3, R4, -0x1, RZ, P0, !PT",
)


@pytest.mark.parametrize("sass", [UNWRITTEN, ITSELF, THREAD, HELD])
def test_an_operand_at_a_lost_address_is_found(sass: str) -> None:
    assert "wrong address" in lost_descriptor(sass)


@pytest.mark.parametrize("sass", [CLEARED, ONE_WAY, ROUND, ADDRESS, BACK, ""])
def test_an_operand_at_an_address_that_is_known_passes(sass: str) -> None:
    assert not lost_descriptor(sass)


def test_a_number_that_leaves_its_half_is_found() -> None:
    assert "268435456" in mixed_halves(OVERFLOWS)
    assert "268435456" in mixed_halves(OVERFLOWS.replace("%rd33, %rd35", "%rd35, %rd33"))
    # 16 times the number of a thread stays in it, and a sum of what is not shifted is an address
    assert not mixed_halves(OVERFLOWS.replace("268435456", "16"))
    assert not mixed_halves(OVERFLOWS.replace(", 33", ", 4"))


def test_only_kernels_with_wgmma_are_disassembled() -> None:
    assert not why_wrong({"ptx": ".target sm_90a\n mma.sync", "cubin": None})
    assert not why_wrong({})  # what was made by no PTX


def test_what_compiles_to_something_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(op="gla", K=32, V=32)
    config = default_config("rescan", problem)
    module = build.load(render(problem, "rescan", config))
    made: dict[str, Any] = {"ptx": OVERFLOWS}
    monkeypatch.setattr("triton.compile", lambda *_, **__: SimpleNamespace(asm=made))
    arguments = (module, "rescan_kernel", problem, "rescan", build.launch_options(config))
    with pytest.raises(BuildError, match="rescan_kernel would compute something else: LLVM"):
        build.compile_kernel(*arguments, named_device("sm_90"))
    made["ptx"] = ""
    assert build.compile_kernel(*arguments, named_device("sm_90")).asm is made


@pytest.mark.parametrize("K", [64, 128])
def test_grad_key_of_what_only_writes_has_no_wgmma_in_chunks_of_64(K: int) -> None:
    problem = Problem(op="gla", K=K, V=K)
    config = default_config("grad_key", problem, BT=64, arch="sm_90")
    assert config["num_warps"] == default_config("grad_key", problem, BT=64)["num_warps"] == 2
    four = config.replace(num_warps=4)
    assert "ptxas 12.8" in str(why_invalid(four, problem, "sm_90"))
    assert why_invalid(four, problem, "sm_100") is None
    other = default_config("grad_key", Problem(K=K, V=K), BT=64, arch="sm_90")
    assert other["num_warps"] == 4
