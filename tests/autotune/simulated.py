"""A GPU that is not the cost model: a timer with a formula of its own, seeded coefficients, noise, drift, outliers.

It overlaps what a kernel does smoothly (the cost model takes a maximum), lets occupancy hide latency and counts the
last wave by its size; every rate and latency is the table's times a factor of [0.5, 2]; each config has a deviation of
its own of 10% that no model knows; each measurement 1.5% of noise, a slow drift of 5%, and one in twenty is up to three
times too long.
"""

import random
from dataclasses import dataclass, field
from math import exp, sin

from fastconv.autotune import Config, Gpu, Work
from fastconv.autotune.cost_model import occupancy_of


@dataclass
class Timer:
    gpu: Gpu
    seed: int
    calls: int = 0
    _own: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = random.Random(self.seed)
        names = ("matrix", "vector", "L2", "DRAM", "step", "program", "launch")
        self._factors = {name: 2 ** generator.uniform(-1, 1) for name in names}
        self._overlap = generator.uniform(2, 6)
        self._noise = random.Random(self.seed + 1)

    def truth(self, work: Work, config: Config) -> float:
        """Seconds without what disturbs a measurement."""
        gpu, factor = self.gpu, self._factors
        share = work.matrix_share
        rate = gpu.matrix_rate * share * 0.75 * factor["matrix"] if share else gpu.vector_rate / 2 * factor["vector"]
        math = work.steps * work.step_flops / (rate / gpu.multiprocessors)
        l2 = work.steps * work.step_bytes / (gpu.l2_bandwidth * factor["L2"] / gpu.multiprocessors)
        occupancy = max(1, occupancy_of(work, gpu))
        latency = 2e-6 * factor["program"] + work.steps * 1e-6 * factor["step"] / max(work.stages - 1, 1)
        waves = work.programs / (gpu.multiprocessors * occupancy)
        tail = int(waves) + (0 if waves == int(waves) else 0.5 + 0.5 * (waves - int(waves)))
        busy = (math**self._overlap + l2**self._overlap) ** (1 / self._overlap) * occupancy
        seconds = tail * (busy**self._overlap + latency**self._overlap) ** (1 / self._overlap)
        dram = work.dram_bytes / (gpu.bandwidth * 0.85 * factor["DRAM"])
        seconds = (seconds**self._overlap + dram**self._overlap) ** (1 / self._overlap)
        if work.extra_bytes:
            seconds += 5e-6 * factor["launch"] + work.extra_bytes / (gpu.bandwidth * 0.85 * factor["DRAM"])
        if work.registers > 255:
            seconds *= 10
        key = repr(sorted(config.items()))
        own = self._own.setdefault(key, exp(random.Random(f"{self.seed} {key}").gauss(0, 0.1)))
        return (seconds + 3e-6 * factor["launch"]) * own

    def __call__(self, work: Work, config: Config) -> float:
        """One measurement, in seconds."""
        self.calls += 1
        seconds = self.truth(work, config) * exp(self._noise.gauss(0, 0.015)) * (1 + 0.05 * sin(self.calls / 40))
        return seconds * (self._noise.uniform(1.2, 3) if self._noise.random() < 0.05 else 1)
