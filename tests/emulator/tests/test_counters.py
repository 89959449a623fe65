"""What the emulator counts of small kernels, against what hardware's rules give by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastconv.kernels.families.splits import split_sum
from fastconv.kernels.launch.launch import run
from tests import emulator
from tests.emulator import count, engine, ptx
from tests.emulator.counters import Counters

WARPS = 4


@pytest.fixture(autouse=True)
def _counted():
    with emulator.options(counters=True):
        yield


def counted() -> dict[str, Any]:
    """Of the latest launch."""
    counters = emulator.launches()[-1].counters
    assert counters is not None
    return counters


@triton.jit
def move(x_ptr, out_ptr, first, step, repeat, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, tl.load(x_ptr + first + index // repeat * step))


def moved(block: int, step: int = 1, first: int = 0, repeat: int = 1, dtype: torch.dtype = torch.float32):
    x, out = torch.zeros(block * step + first, dtype=dtype), torch.empty(block, dtype=dtype)
    move[(1,)](x, out, first, step, repeat, block, num_warps=WARPS)
    return counted()["global"]


@pytest.mark.parametrize(
    ("dtype", "block", "requests"),
    [
        (torch.float32, 128, 4),  # one element a thread
        (torch.bfloat16, 128, 4),
        (torch.float32, 512, 4),  # 16 bytes a thread
        (torch.bfloat16, 2048, 8),
    ],
)
def test_neighbours_move_the_least_sectors(dtype: torch.dtype, block: int, requests: int) -> None:
    size = block * dtype.itemsize
    how = {"requests": requests, "sectors": size // 32, "least_sectors": size // 32, "bytes": size, "efficiency": 1.0}
    x, out = torch.zeros(block, dtype=dtype), torch.empty(block, dtype=dtype)
    plain_copy[(1,)](x, out, block, num_warps=WARPS)
    assert counted()["global"] == {"load": how, "store": how}
    assert counted()["unique_bytes"] == {"load": size, "store": size}


@triton.jit
def plain_copy(x_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, tl.load(x_ptr + index))


def test_a_stride_moves_a_sector_an_element() -> None:
    found = moved(128, step=8)["load"]
    assert (found["requests"], found["sectors"], found["least_sectors"]) == (4, 128, 16)
    found = moved(128, step=2)["load"]
    assert (found["sectors"], found["least_sectors"]) == (32, 16)


def test_a_start_between_sectors_costs_one_more() -> None:
    found = moved(128, first=1)["load"]
    assert (found["sectors"], found["least_sectors"]) == (4 * 5, 4 * 4)


def test_threads_that_read_one_element_move_it_once() -> None:
    found = moved(128, repeat=128)["load"]
    assert (found["requests"], found["sectors"], found["least_sectors"]) == (4, 4, 4)
    assert counted()["unique_bytes"]["load"] == 4


# Shared memory, by hand-written PTX: Triton would choose the layout.

KERNEL = """
.version 8.0
.target sm_{arch}
.address_size 64
.extern .shared .align 1024 .b8 memory[];
.visible .entry handwritten() .reqntid 32 {{
.reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>;
mov.u32 %r0, %tid.x;
mov.b32 %r1, memory;
mad.lo.s32 %r2, %r0, {step}, %r1;
setp.lt.u32 %p1, %r0, 16;
{body}
ret;
}}"""


def wavefronts(body: str, step: int) -> dict[str, tuple[int, int]]:
    """What ``body`` takes, and the least, where ``%r2`` is ``step`` bytes from thread to thread."""
    gpu, counters = emulator.current(), Counters()
    text = KERNEL.format(arch=gpu.gpu.arch, step=step, body=body)
    program = engine.Program(ptx.parse(text)["handwritten"], gpu.options)
    engine.Running(program, (1, 1, 1), 32, 1 << 15, b"", gpu.allocations, counters).run()
    found = counters.result()
    least = found["shared_wavefronts_without_conflicts"]
    return {how: (count, least[how]) for how, count in found["shared_wavefronts"].items() if count}


STORES = {
    2: "mov.b16 %h0, 0; st.shared.b16 [%r2], %h0;",
    4: "st.shared.b32 [%r2], %r0;",
    8: "st.shared.v2.b32 [%r2], {%r0, %r0};",
    16: "st.shared.v4.b32 [%r2], {%r0, %r0, %r0, %r0};",
}


@pytest.mark.parametrize(
    ("width", "step", "expected"),
    [
        (2, 2, (1, 1)),  # two threads a word
        (4, 4, (1, 1)),
        (4, 8, (2, 1)),
        (4, 128, (32, 1)),  # one bank
        (4, 132, (1, 1)),  # padded by a word
        (8, 8, (2, 2)),
        (8, 16, (4, 2)),
        (8, 128, (32, 2)),
        (16, 16, (4, 4)),
        (16, 32, (8, 4)),
        (16, 128, (32, 4)),
        (16, 144, (4, 4)),
    ],
)
def test_wavefronts_of_shared_memory(width: int, step: int, expected: tuple[int, int]) -> None:
    assert wavefronts(STORES[width], step) == {"store": expected}


def test_wavefronts_of_threads_that_take_part() -> None:
    assert wavefronts("@%p1 st.shared.b32 [%r2], %r0;", 8) == {"store": (1, 1)}
    assert wavefronts("@%p1 st.shared.v4.b32 [%r2], {%r0, %r0, %r0, %r0};", 16) == {"store": (2, 2)}


def test_one_word_for_all_threads_takes_one_wavefront() -> None:
    # (All threads store the same word first: that is one wavefront too.)
    body = "st.shared.b32 [%r1], %r1; bar.sync 0; ld.shared.b32 %r3, [%r1];"
    assert wavefronts(body, 4) == {"store": (1, 1), "load": (1, 1)}


@pytest.mark.parametrize(("step", "expected"), [(16, 4), (32, 8), (128, 32), (144, 4)])
def test_wavefronts_of_matrices(step: int, expected: int) -> None:
    """Eight rows of 16 bytes are a matrix, and four matrices a load."""
    stores = STORES[16]
    body = stores + "bar.sync 0; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r2];"
    assert wavefronts(body, step) == {"store": (expected, 4), "matrix": (expected, 4)}


# Loops and bulk copies.


@triton.jit
def summed(x_ptr, out_ptr, steps, step, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for n in range(steps):
        total += tl.load(x_ptr + n * BLOCK * step + index * step)
    tl.store(out_ptr + index, total)


@pytest.mark.parametrize("step", [1, 8])
def test_the_main_loop_is_counted_by_its_steps(step: int) -> None:
    x, out = torch.zeros(5 * 128 * step), torch.empty(128)
    summed[(3,)](x, out, 5, step, 128, num_warps=WARPS)
    found = counted()
    loop = found["main_loop"]
    assert found["programs"] == 3
    assert loop["steps"] == 5
    assert loop["requests"] == 3 * 5 * WARPS
    assert (loop["sectors"], loop["least_sectors"]) == (3 * 5 * 16 * step, 3 * 5 * 16)
    assert loop["instructions"] == int(loop["instructions"]) < 20
    assert [(row["in_main_loop"], row["sectors"]) for row in found["wasteful"]] == ([(True, 1920)] if step > 1 else [])


def test_instructions_of_warps() -> None:
    """Each warp of each program loads once and stores once, whoever is masked off."""
    x, out = torch.zeros(128), torch.empty(128)
    plain_copy[(6,)](x, out, 128, num_warps=WARPS)
    # (ld.param is an instruction of PTX's too.)
    found = counted()["warp_instructions"]
    assert found["st"] == 6 * WARPS
    assert found["ld"] == 6 * WARPS * (1 + 2)


@triton.jit
def move_box(x, out, row, column):
    out.store([row, column], x.load([row, column]))


@pytest.mark.parametrize(
    ("row", "column", "inside", "sectors"),
    [
        (0, 0, 16 * 64, 16 * 2),
        (-4, 0, 12 * 64, 12 * 2),  # rows outside the tensor
        (0, 4, 16 * 64, 16 * 3),  # between sectors
    ],
)
def test_bytes_of_bulk_copies(row: int, column: int, inside: int, sectors: int) -> None:
    if emulator.current().gpu.arch < 90:
        pytest.skip("instructions of sm_90")
    x, out = torch.zeros(32, 64), torch.empty(32, 64)
    operands = [TensorDescriptor.from_tensor(t, [16, 16]) for t in (x, out)]
    move_box[(1,)](*operands, row, column, num_warps=WARPS)
    expected = {"box_bytes": 16 * 64, "inside_bytes": inside, "sectors": sectors, "least_sectors": inside // 32}
    assert counted()["bulk"] == {"load": expected, "store": expected}
    assert counted()["unique_bytes"] == {"load": inside, "store": inside}


def test_a_sum_over_warps_meets_bank_conflicts() -> None:
    """Triton's sum over an axis that lies across warps stores each output's parts side by side: with four warps, 16
    threads of a warp that hold 4 neighbouring outputs each store 64 bytes apart, 8 words to a bank."""
    run(split_sum(20, 64, 1, 64, torch.bfloat16), torch.zeros(20, 64 * 64), torch.empty(64 * 64, dtype=torch.bfloat16))
    rows = [row for row in counted()["wasteful"] if "st.shared.b32" in row["instruction"]]
    assert len([row for row in rows if row["wavefronts"] == 8 * row["least_wavefronts"]]) == 4


def test_a_sample_of_programs_stands_for_all() -> None:
    """As many programs as are asked for, no two the same, and what one counts."""
    x, out = torch.zeros(1000 * 128), torch.empty(1000 * 128)
    with emulator.options(sample=7):
        whole_grid[(1000,)](x, out, 128, num_warps=WARPS)
    found = counted()
    assert found["programs"] == 7
    assert found["global"]["load"]["sectors"] == 7 * 16
    assert found["unique_bytes"] == {"load": 7 * 512, "store": 7 * 512}


@triton.jit
def whole_grid(x_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + index, tl.load(x_ptr + index))


def test_the_table_of_counts_names_every_kernel_that_is_counted() -> None:
    page = count.PAGE.read_text()
    table = page[page.index(count.BEGIN) : page.index(count.END)]
    for layer in count.LAYERS:
        for gpu, entries in layer.kernels.items():
            for entry in entries.split():
                name, kernel = entry.split(":")
                assert f"| {gpu} | {kernel.removesuffix('_kernel')} | {layer.name}, {name} |" in table


def test_a_weight_laid_out_as_runs_moves_whole_sectors() -> None:
    layer = next(layer for layer in count.LAYERS if "conv_rows_weight_kernel" in layer.kernels.get("H200", ""))
    record, _ = count.find(count.passes(layer, layer.small)[0], "fprop", "conv_rows_weight_kernel")
    found = count.count(record, 0)["global"]
    assert found["store"]["efficiency"] == 1.0
    assert found["load"]["sectors"] < 2 * found["load"]["least_sectors"]
