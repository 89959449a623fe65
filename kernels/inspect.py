"""What the compiler makes of a launch for a named GPU, which need not be here: compile, disassemble, count.

Registers and spills alone do not say whether a kernel is good. So the instructions are read too: which tensor cores it
uses, whether every wgmma is waited for (a loop that may not run makes ptxas do that, silently), how wide its loads are,
whether they are asynchronous, and how many instructions one step takes.

``python -m fastconv.kernels.inspect [--json] [--quick]`` reports the kernels of ResNet-50's telling layers for A100,
H200 and B200. It takes a process without TRITON_INTERPRET: one process cannot both interpret and compile.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastconv.autotune import Config, Gpu
from fastconv.autotune.gpus import A100, B200, H200
from fastconv.kernels import dispatch, mend, reduce
from fastconv.kernels.launch import Launch
from fastconv.kernels.layout import INT32_MAX
from fastconv.kernels.problem import DIRECTIONS, ConvProblem, conv_problem
from fastconv.kernels.tiles import pixel_tile

GPUS = (A100, H200, B200)
# Of every multiprocessor from compute capability 8.0 to 10.0.
REGISTERS, THREADS, TENSOR_COLUMNS, RESERVED_SHARED = 65536, 2048, 512, 1024
# The tensor cores that each architecture is to be used by, and their SASS instruction.
TENSOR_CORES = {"mma": r"[HIQ]MMA", "wgmma": r"[HIQ]GMMA", "tcgen05": r"UTC\w*MMA"}
# A memory instruction's modifier -> bytes a thread; 4 where it has none of these.
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
Code = list[tuple[int, str, str]]  # (address, opcode, operands)
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)


@dataclass(frozen=True)
class Compiled:
    """One binary. Opcodes keep their modifiers: ``LDGSTS.E.BYPASS.128``."""

    arch: int
    warps: int
    registers: int  # a thread
    stack: int  # bytes a thread
    spills: int  # instructions that move registers to and from the stack
    shared_memory: int  # bytes a program
    tensor_columns: int  # of tensor memory, a program
    opcodes: Mapping[str, int]
    tensor_cores: str | None  # "mma", "wgmma", "tcgen05"
    serialised: bool  # every wgmma is waited for before the next one
    step: int | None  # instructions of the loop around the tensor cores

    def global_accesses(self, opcode: str) -> dict[int, int]:
        """Bytes a thread moves -> how many such instructions. ``opcode``: LDG, LDGSTS (asynchronous) or STG."""
        widths: Counter[int] = Counter()
        for name, count in self.opcodes.items():
            whole, *modifiers = name.split(".")
            if whole == opcode:
                widths[next((WIDTHS[word] for word in modifiers if word in WIDTHS), 4)] += count
        return dict(sorted(widths.items()))

    @property
    def load_bytes(self) -> dict[int, int]:
        """Bytes a thread -> loads from global memory, asynchronous ones included."""
        return dict(sorted((Counter(self.global_accesses("LDG")) + Counter(self.global_accesses("LDGSTS"))).items()))

    def occupancy(self, gpu: Gpu) -> tuple[int, str]:
        """Programs that a multiprocessor of ``gpu`` holds at once, and what limits them."""
        threads = 32 * self.warps
        limits = {
            "registers": REGISTERS // (-(-self.registers // 8) * 8 * threads),
            "shared memory": (gpu.shared_memory + RESERVED_SHARED) // (self.shared_memory + RESERVED_SHARED),
            "warps": THREADS // threads,
        }
        if self.tensor_columns:
            limits["tensor memory"] = TENSOR_COLUMNS // self.tensor_columns
        limit = min(limits, key=lambda name: limits[name])
        return limits[limit], limit


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile for compute capability ``arch`` (90 for 9.0), through Triton's cache, and read the binary.

    Pointers count as aligned to 16 bytes, as a launch finds those of torch's allocator. Raises what Triton's compiler
    raises, and RuntimeError under TRITON_INTERPRET.
    """
    if mend.interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled in this process")
    kernel, names = launch.kernel, launch.kernel.arg_names
    numbers = (
        "fp32" if isinstance(value, float) else "i32" if -INT32_MAX - 1 <= value <= INT32_MAX else "i64"
        for value in launch.scalars
    )
    types = dict(zip(names, (*launch.pointers, *numbers), strict=False))
    constants = {name: None for name, type_ in types.items() if type_ is None} | dict(launch.constants)
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in constants else types[name] for name in names},
        constants,
        {(index,): [["tt.divisibility", 16]] for index, type_ in enumerate(launch.pointers) if type_ is not None},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    binary = triton.compile(source, GPUTarget("cuda", arch, 32), options)
    return _read(binary, arch)


def _read(binary: Any, arch: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    code = parse(text)
    opcodes = Counter(opcode for _, opcode, _ in code)
    whole = Counter(opcode.split(".")[0] for _, opcode, _ in code)
    cores = next((name for name, form in TENSOR_CORES.items() if any(re.fullmatch(form, op) for op in whole)), None)
    return Compiled(
        arch=arch,
        warps=binary.metadata.num_warps,
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        spills=whole["LDL"] + whole["STL"],
        shared_memory=binary.metadata.shared,
        tensor_columns=getattr(binary.metadata, "tmem_size", None) or 0,
        opcodes=opcodes,
        tensor_cores=cores,
        serialised=cores == "wgmma" and serialised(code),
        step=None if cores is None else loop_length(code, TENSOR_CORES[cores]),
    )


def parse(sass: str) -> Code:
    """The instructions of cuobjdump's listing, predicates left out."""
    return [(int(address, 16), opcode, operands.strip()) for address, opcode, operands in INSTRUCTION.findall(sass)]


def serialised(code: Code) -> bool:
    """Whether every wgmma is followed by a wait for all of them, before the next one and inside the same loop."""
    products = waits = 0
    for index, (_, opcode, _) in enumerate(code):
        if opcode.split(".")[0].endswith("GMMA"):
            products += 1
            after = (step for step in code[index + 1 :] if re.match(r"\w?GMMA|BRA|WARPGROUP\.DEPBAR", step[1]))
            _, follower, operands = next(after, (0, "", ""))
            waits += follower.startswith("WARPGROUP") and operands.split() == ["gsb0,", "0x0"]
    return products > 0 and waits == products


def loop_length(code: Code, product: str) -> int | None:
    """Instructions of the shortest loop around a tensor-core instruction; None where there is no loop."""
    products = [index for index, (_, opcode, _) in enumerate(code) if re.fullmatch(product, opcode.split(".")[0])]
    index_of = {address: index for index, (address, _, _) in enumerate(code)}
    lengths = []
    for end, (_, opcode, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
        start = index_of.get(int(target[1], 16), end) if target else end
        if any(start <= index < end for index in products):
            lengths.append(end - start + 1)
    return min(lengths, default=None)


_work: list[tuple[Launch, int]] = []  # of a worker process: inherited, because Triton's functions do not pickle


def compile_all(
    wanted: Iterable[tuple[Launch, Gpu]], jobs: int | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[tuple[Any, int], Compiled]:
    """Compile each distinct binary once: (launch.compile_key, gpu.arch) -> Compiled.

    ``jobs`` processes (one a core unless given); ``progress(done, all)`` after each. Raises RuntimeError that names the
    launch where one does not compile.
    """
    distinct = {(launch.compile_key, gpu.arch): (launch, gpu.arch) for launch, gpu in wanted}
    results: dict[tuple[Any, int], Compiled] = {}
    if not distinct:
        return results
    with ProcessPoolExecutor(
        min(jobs or os.cpu_count() or 1, len(distinct)),
        multiprocessing.get_context("fork"),
        _work.extend,
        (list(distinct.values()),),
    ) as pool:
        keys = {pool.submit(_compile_one, index): key for index, key in enumerate(distinct)}
        for future in as_completed(keys):
            results[keys[future]] = future.result()
            if progress is not None:
                progress(len(results), len(distinct))
    return results


def _compile_one(index: int) -> Compiled:
    launch, arch = _work[index]
    try:
        return compile_launch(launch, arch)
    except Exception as error:
        raise RuntimeError(
            f"{launch.name} does not compile for sm_{arch} with {dict(launch.constants)}, {launch.num_warps} warps, "
            f"{launch.num_stages} stages: {error}"
        ) from error


def _layer(channels: int, size: int, filters: int, filter_size: int, stride: int = 1) -> ConvProblem:
    return conv_problem(
        (64, channels, size, size),
        (filters, channels, filter_size, filter_size),
        None,
        (stride,) * 2,
        (filter_size // 2,) * 4,
        (1, 1),
        1,
        torch.bfloat16,
    )


# ResNet-50's at batch 64: the first, then both filter sizes, with and without stride, on large and small maps.
LAYERS = (
    _layer(3, 224, 64, 7, 2),
    _layer(128, 56, 128, 3, 2),
    _layer(64, 56, 256, 1),
    _layer(64, 56, 64, 3),
    _layer(512, 7, 512, 3),
    _layer(256, 56, 512, 1, 2),
    _layer(1024, 14, 256, 1),
)
QUICK = 3


def launches_of(problem: ConvProblem, bias: bool, gpu: Gpu) -> list[tuple[str, Config, Launch]]:
    """Every launch that training one layer takes on ``gpu``, operands dense: (direction, config, launch)."""
    found = []
    for direction in DIRECTIONS:
        plan = dispatch.plan(direction, problem, gpu, dispatch.Layout(bias=bias and direction == "fprop"))
        found += [(direction, plan.choice.config, launch) for launch in plan.launches if plan.choice is not None]
    if not bias:
        return found
    pixels, channels = problem.output_pixels, problem.out_channels
    config = pixel_tile(pixels, channels, problem.dtype.itemsize, 1, True, gpu).config
    launches = reduce.channel_sum(pixels, channels, channels, problem.dtype, config)
    return found + [("bias gradient", config, launch) for launch in launches]


def report(
    problems: Iterable[ConvProblem], gpus: Iterable[Gpu], progress: Callable[[int, int], None] | None = None
) -> list[dict[str, Any]]:
    """One row for each distinct binary and GPU, named by the first problem that runs it."""
    launches: dict[tuple[Any, Gpu], tuple[str, ConvProblem, Config, Launch]] = {}
    for gpu in gpus:
        for problem in problems:
            for direction, config, launch in launches_of(problem, True, gpu):
                launches.setdefault((launch.compile_key, gpu), (direction, problem, config, launch))
    compiled = compile_all(((launch, gpu) for (_, gpu), (*_, launch) in launches.items()), progress=progress)
    rows = []
    for (key, gpu), (direction, problem, config, launch) in launches.items():
        binary = compiled[key, gpu.arch]
        programs, limit = binary.occupancy(gpu)
        rows.append(
            {
                "kernel": launch.name,
                "direction": direction,
                "target": gpu.name,
                "problem": problem.describe(),
                "config": dict(config),
                "registers": binary.registers,
                "spills": binary.spills,
                "stack": binary.stack,
                "shared_memory": binary.shared_memory,
                "occupancy": programs,
                "occupancy_limit": limit,
                "tensor_cores": binary.tensor_cores,
                "wgmma_serialised": binary.serialised,
                "step_instructions": binary.step,
                "load_bytes": binary.load_bytes,
                "async_load_bytes": binary.global_accesses("LDGSTS"),
                "store_bytes": binary.global_accesses("STG"),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, a block for each GPU."""
    lines = []
    for target in dict.fromkeys(row["target"] for row in rows):
        cells = [("kernel", "problem", "tile", "registers", "spills", "shared", "programs", "tensor cores", "loads")]
        for row in rows:
            if row["target"] == target:
                tile = [str(row["config"][name]) for name in row["config"] if name.startswith("BLOCK_")]
                cells.append(
                    (
                        f"{row['kernel'].removesuffix('_kernel')} {row['direction']}",
                        row["problem"],
                        "x".join(tile),
                        str(row["registers"]),
                        str(row["spills"]),
                        f"{row['shared_memory'] / 1024:.0f} KB",
                        f"{row['occupancy']} ({row['occupancy_limit']})",
                        (row["tensor_cores"] or "-") + (" SERIALISED" if row["wgmma_serialised"] else ""),
                        ", ".join(f"{count} x {width} B" for width, count in row["load_bytes"].items()),
                    )
                )
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += [target]
        lines += ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells] + [""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m fastconv.kernels.inspect", description="What the compiler makes of each kernel."
    )
    parser.add_argument("--json", action="store_true", help="JSON on standard output instead of a table")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} layers instead of {len(LAYERS)}")
    options = parser.parse_args(arguments)
    if mend.interpreting():
        print("inspect: TRITON_INTERPRET is set, and one process cannot both interpret and compile", file=sys.stderr)
        return 2

    def progress(done: int, everything: int) -> None:
        if sys.stderr.isatty():
            print(f"\rcompiled {done} of {everything}", end="\n" if done == everything else "", file=sys.stderr)

    rows = report(LAYERS[: QUICK if options.quick else None], GPUS, progress)
    print(json.dumps({"kernels": rows}, indent=1) if options.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
