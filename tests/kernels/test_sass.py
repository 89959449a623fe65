"""Reading the compiler's output, from listings, without a compiler."""

import dataclasses
from collections import Counter

import pytest
import torch

from fastconv.autotune.gpus import A100, B200, H200
from fastconv.cli.inspect_layers import LAYERS, launches_of
from fastconv.kernels import dispatch
from fastconv.kernels.compile.ahead import operands
from fastconv.kernels.compile.sass import (
    Compiled,
    compile_all,
    first_operands,
    in_flight,
    mix,
    parse,
    read_each,
    serialised,
    step_of,
    wgmma_waits,
)
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.launch import Launch
from tests.marks import compiling

# cuobjdump's output; the second column of encodings is cut off after the first line.
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
    step = step_of(parse(PIPELINED), "HGMMA")
    assert step is not None and (step[0][0], step[-1][0], len(step)) == (0x2420, 0x2C20, 5)
    assert step_of(parse(PIPELINED), "HMMA") is None


def test_waits_say_how_many_products_go_on() -> None:
    assert wgmma_waits(parse(PIPELINED)) == (1, 0)
    assert wgmma_waits(step_of(parse(PIPELINED), "HGMMA") or []) == (1,)


def test_the_first_operand_comes_from_shared_memory_or_registers() -> None:
    line = "        /*2470*/                   HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;\n"
    assert first_operands(parse(PIPELINED + line)) == {"shared memory": 2, "registers": 1}
    line = "        /*1e90*/      UTCHMMA %s[UR16], gdesc[UR20], tmem[UR22], tmem[UR50], idesc[UR51], !UPT ;\n"
    assert first_operands(parse(line % "gdesc")) == {"shared memory": 1}
    assert first_operands(parse(line % "tmem" + "        /*1ed0*/ UTCBAR [UR24], URZ ;\n")) == {"tensor memory": 1}


def test_copies_in_flight_are_the_pipelines_buffers_but_one() -> None:
    ttgir = """
    %s = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64, #shared, #smem, mutable> loc(#loc416)
    %x = ttg.local_alloc : () -> !ttg.memdesc<3x128x64xbf16, #shared, #smem, mutable> loc(#loc312)
    %w = ttg.local_alloc : () -> !ttg.memdesc<3x64x32xf32, #shared, #smem, mutable> loc(#loc313)
    %y = ttg.local_alloc %z : (tensor<64x64xf32>) -> !ttg.memdesc<64x64xf32, #shared, #smem> loc(#loc313)
    """
    assert in_flight(ttgir) == (2, 2 * (128 * 64 * 2 + 64 * 32 * 4))
    assert in_flight("") == (0, 0)


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("HMMA.16816.F32.BF16", "tensor cores"),
        ("HGMMA.64x128x16.F32.BF16", "tensor cores"),
        ("UTCHMMA", "tensor cores"),
        ("UTMALDG.3D", "bulk copies in"),
        ("UTMASTG.2D", "bulk copies out"),
        ("LDGSTS.E.BYPASS.128", "asynchronous loads"),
        ("LDG.E.128", "loads"),
        ("STG.E.128", "stores"),
        ("LDSM.16.M88.4", "shared memory"),
        ("LDL.64", "spills"),
        ("FFMA", "arithmetic"),
        ("HFMA2.BF16_V2", "arithmetic"),
        ("F2FP.BF16.F32.PACK_AB", "arithmetic"),
        ("WARPGROUP.DEPBAR.LE", "waiting"),
        ("LDGDEPBAR", "waiting"),
        ("UTCBAR", "waiting"),
        ("IMAD.WIDE", "integers"),
        ("ULOP3.LUT", "integers"),
        ("BRA", "other"),
        ("NOP", "other"),
    ],
)
def test_each_instruction_is_of_one_kind(opcode: str, kind: str) -> None:
    assert mix(Counter([opcode, opcode])) == {kind: 2}


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


@pytest.mark.parametrize(
    ("arch", "expected"), [(80, 16), (86, 12), (89, 12), (90, 16), (103, 16), (120, 12), (121, 12)]
)
def test_threads_of_a_multiprocessor_depend_on_the_architecture(arch: int, expected: int) -> None:
    small = dataclasses.replace(COMPILED, warps=4, registers=24, shared_memory=0)
    assert small.occupancy(dataclasses.replace(H200, arch=arch)) == (expected, "warps")


@pytest.mark.parametrize(("arch", "expected"), [(86, 16), (89, 24), (90, 32)])
def test_programs_of_a_multiprocessor_are_limited_too(arch: int, expected: int) -> None:
    tiny = dataclasses.replace(COMPILED, warps=1, registers=24, shared_memory=0)
    assert tiny.occupancy(dataclasses.replace(H200, arch=arch)) == (expected, "programs")


def test_absent_operands_stand_for_nothing() -> None:
    launch = Launch(None, (1, 1, 1), ("*bf16", None, "*i64"), (), {}, 4, 3)
    x, absent, index = operands(launch)
    assert (x.dtype, absent, index.dtype) == (torch.bfloat16, None, torch.int64)
    assert x.data_ptr() % 16 == 0


@pytest.mark.skipif(not interpreter.interpreting(), reason="what only the interpreter's process refuses")
def test_the_interpreter_refuses_to_compile() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_all([])


@pytest.mark.compile
@compiling
def test_a_binary_is_read_and_a_failure_is_told() -> None:
    with dispatch.only_family("gather"):
        fprop, *_, ordered_sum = [launch for _, _, launch in launches_of(LAYERS[3], False, H200)]
    broken = dataclasses.replace(fprop, constants={**fprop.constants, "BLOCK_M": 48})
    failures = read_each([(broken, H200), (fprop, H200)]).failures
    compiled = compile_all([(launch, H200) for launch in (fprop, ordered_sum)], listings=["sass", "ptx", "ttgir"])
    first, third = (compiled[launch.compile_key, 90] for launch in (fprop, ordered_sum))
    assert list(failures) == [(broken.compile_key, 90)]
    why = failures[broken.compile_key, 90]
    assert why.startswith("conv_gather_kernel does not compile for") and "\n" not in why
    # A pipelined product on an H200: both operands in shared memory, one product going on at the wait.
    assert set(first.operands) == {"shared memory"} and first.waits == (1,)
    assert first.copies == fprop.num_stages - 1 and 0 < first.copy_bytes < first.shared_memory
    assert first.step == sum(first.step_opcodes.values()) and mix(first.step_opcodes)["asynchronous loads"] > 0
    assert [("HGMMA" in first.listings["sass"]), (".target sm_90a" in first.listings["ptx"])] == [True, True]
    assert "ttg.async_wait" in first.listings["ttgir"] and not third.operands and third.step is None
