"""How long a tiled kernel takes on a GPU: a roofline per multiprocessor, with waves, occupancy and latency.

Every figure it returns is a prediction: it ranks tiles.

The model leaves out what a fused epilogue moves beside the result: a residual, and statistics of 8 bytes for each
channel of a tile. Measured problems have no epilogue. All configs move nearly the same, which is a floor under their
times, so the choice without it stays within the model's resolution of the best with it.

Registers, shared memory and occupancy are estimates when a tile is chosen. A tuning run and ``fastconv inspect`` take
the compiled binary's.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastconv.autotune.gpus import Gpu

# Share of the peak matrix rate that a well-fed tile reaches.
MATRIX_EFFICIENCY = 0.75
# Share of DRAM's peak that streaming kernels reach.
DRAM_EFFICIENCY = 0.85
# Seconds from a load's issue to its use, spread over the copies in flight; start and end of a program; a launch.
STEP_LATENCY = 1.0e-6
PROGRAM_LATENCY = 2.0e-6
LAUNCH = 3.0e-6
# A program that spills registers is taken only if all others spill too.
SPILLING = 100.0
# The interpreter's seconds on a common CPU: for a program and a step of any size, and for an operand's element.
INTERPRETED_PROGRAM = 3e-3
INTERPRETED_STEP = 1.5e-3
INTERPRETED_ELEMENT = 1.7e-8

MAX_REGISTERS = 255  # that a thread can name
# Bytes of the partial sums that a first launch leaves to a second. Tiles of the layer lists want less, and a training
# step that fits a GPU can spare them.
MAX_WORKSPACE = 1 << 29


@dataclass(frozen=True)
class Work:
    """What one config makes of one problem."""

    programs: int
    steps: int  # of one program
    step_flops: int
    step_elements: int  # that a step loads
    step_bytes: int  # the same in bytes, from L2 at best
    dram_bytes: int  # that the launch must move in all
    shared_memory: int  # bytes a program, all stages together
    registers: int  # a thread
    warps: int
    stages: int
    matrix_share: float  # of Gpu.matrix_rate for this dtype; 0: vector units
    extra_bytes: int = 0  # written to a workspace and read again, counted twice


@dataclass(frozen=True)
class Prediction:
    seconds: float
    bound: str  # "matrix", "L2", "DRAM", "latency"
    occupancy: int  # programs a multiprocessor


def predict(work: Work, gpu: Gpu) -> Prediction | None:
    """Predicted time; None if the work does not fit a multiprocessor, or its partial sums the workspace."""
    if work.extra_bytes > 2 * MAX_WORKSPACE:
        return None
    if gpu.interpreted:
        step = INTERPRETED_STEP + INTERPRETED_ELEMENT * work.step_elements
        return Prediction(work.programs * (INTERPRETED_PROGRAM + work.steps * step), "interpreter", 1)
    occupancy = occupancy_of(work, gpu)
    if occupancy == 0:
        return None
    rate = gpu.matrix_rate * work.matrix_share * MATRIX_EFFICIENCY if work.matrix_share else gpu.vector_rate / 2
    busy = {
        "matrix": work.steps * work.step_flops / (rate / gpu.multiprocessors),
        "L2": work.steps * work.step_bytes / (gpu.l2_bandwidth / gpu.multiprocessors),
    }
    bound = max(busy, key=lambda name: busy[name])
    latency = PROGRAM_LATENCY + work.steps * STEP_LATENCY / max(work.stages - 1, 1)
    rounds, rest = divmod(-(-work.programs // gpu.multiprocessors), occupancy)
    seconds = rounds * max(occupancy * busy[bound], latency) + (max(rest * busy[bound], latency) if rest else 0.0)
    if seconds <= (rounds + bool(rest)) * latency:
        bound = "latency"
    dram = work.dram_bytes / (gpu.bandwidth * DRAM_EFFICIENCY)
    if dram > seconds:
        seconds, bound = dram, "DRAM"
    if work.extra_bytes:
        seconds += predict_pass(work.extra_bytes, gpu)
    if work.registers > MAX_REGISTERS:
        seconds *= SPILLING * work.registers / MAX_REGISTERS
    return Prediction(seconds + LAUNCH, bound, occupancy)


def predict_pass(moved: int, gpu: Gpu) -> float:
    """Predicted seconds of a launch that only moves ``moved`` bytes: sums of splits, a copy."""
    return LAUNCH + PROGRAM_LATENCY + moved / (gpu.bandwidth * DRAM_EFFICIENCY)


def occupancy_of(work: Work, gpu: Gpu) -> int:
    """Programs that fit a multiprocessor at once."""
    if work.shared_memory > gpu.shared_memory:
        return 0
    threads = 32 * work.warps
    by_registers = 65536 // (-(-min(work.registers, MAX_REGISTERS) // 8) * 8 * threads)
    by_memory = gpu.shared_memory // max(work.shared_memory, 1)
    return min(by_registers, by_memory, gpu.threads // threads, 32)
