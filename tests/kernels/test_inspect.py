"""Reading the compiler's output, on listings: what needs no compiler."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from fastconv.autotune.gpus import A100, B200, H200
from fastconv.kernels.inspect import Compiled, loop_length, parse, serialised

# As cuobjdump prints it, its second column of encodings cut off after the first line.
PIPELINED = """
        Function : conv_gather_kernel
        /*0480*/              @!P0 BRA 0x2e60 ;                     /* 0x0000002800748947 */
        /*2420*/                   WARPGROUP.ARRIVE ;
        /*2470*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*26a0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*26b0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*2c20*/               @P4 BRA 0x2420 ;
        /*2c30*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*46d0*/                   EXIT ;
"""
ONE_A_STEP = """
        /*2470*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*2480*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*2c20*/               @P4 BRA 0x2470 ;
        /*2c30*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
"""
SERIALISED = """
        /*2470*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*2480*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*2490*/                   MOV R1, R2 ;
        /*26a0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*26b0*/                   IADD3 R3, R4, R5, RZ ;
        /*26c0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*2c20*/               @P4 BRA 0x2470 ;
"""
COMPILED = Compiled(
    arch=90,
    warps=8,
    registers=124,
    stack=0,
    spills=0,
    shared_memory=96 << 10,
    tensor_columns=0,
    opcodes={"LDG.E.U16": 3, "LDG.E": 2, "LDGDEPBAR": 7, "LDGSTS.E.BYPASS.128": 24, "LDGSTS.E.64": 4, "STG.E.128": 8},
    tensor_cores="wgmma",
    serialised=False,
    step=159,
)


def test_parse_reads_address_opcode_and_operands() -> None:
    code = parse(PIPELINED)
    assert code[0] == (0x480, "BRA", "0x2e60")
    assert [opcode for _, opcode, _ in code].count("HGMMA.64x128x16.F32.BF16") == 2
    assert code[-1] == (0x46D0, "EXIT", "")


@pytest.mark.parametrize(
    ("listing", "expected"), [(PIPELINED, False), (ONE_A_STEP, False), (SERIALISED, True), ("", False)]
)
def test_serialised_means_a_full_wait_after_every_wgmma(listing: str, expected: bool) -> None:
    assert serialised(parse(listing)) is expected


def test_step_is_the_shortest_loop_around_the_product() -> None:
    assert loop_length(parse(PIPELINED), "HGMMA") == 5
    assert loop_length(parse(PIPELINED), "HMMA") is None


def test_widths_come_from_whole_opcodes() -> None:
    assert COMPILED.global_accesses("LDG") == {2: 3, 4: 2}
    assert COMPILED.global_accesses("LDGSTS") == {8: 4, 16: 24}
    assert COMPILED.load_bytes == {2: 3, 4: 2, 8: 4, 16: 24}
    assert COMPILED.global_accesses("STG") == {16: 8}


@pytest.mark.parametrize(
    ("changes", "gpu", "expected"),
    [
        ({}, H200, (2, "registers")),
        ({"registers": 129}, H200, (1, "registers")),
        ({"registers": 60, "shared_memory": 64 << 10}, H200, (3, "shared memory")),
        ({"registers": 60, "shared_memory": 64 << 10}, A100, (2, "shared memory")),
        ({"registers": 32, "shared_memory": 2 << 10}, H200, (8, "registers")),
        ({"registers": 24, "shared_memory": 2 << 10}, H200, (8, "warps")),
        ({"registers": 60, "shared_memory": 2 << 10, "tensor_columns": 256}, B200, (2, "tensor memory")),
    ],
)
def test_occupancy_names_its_limit(changes: dict[str, int], gpu, expected: tuple[int, str]) -> None:
    assert dataclasses.replace(COMPILED, **changes).occupancy(gpu) == expected


def test_command_refuses_the_interpreter_in_one_line() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fastconv.kernels.inspect"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert len(run.stderr.splitlines()) == 1
    assert "TRITON_INTERPRET" in run.stderr
