"""The fake driver: libcuda built from driver.c, its hooks, and Triton set up to use it."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from triton import knobs

from fastconv.autotune import gpus
from fastconv.autotune.gpus import Gpu
from tests.emulator import engine, ptx
from tests.emulator.counters import LAUNCH_SECONDS, Counters
from tests.emulator.memory import Allocations

LAUNCH_FAILED = 719


EMULATED = {name: getattr(gpus, name) for name in ("A100", "H100", "H200")}


def gpu_to_emulate(name: str) -> Gpu:
    """The GPU called so. Raises ValueError with those that can be emulated."""
    if name not in EMULATED:
        raise ValueError(f"no GPU {name!r} can be emulated; there are: {', '.join(EMULATED)}")
    return EMULATED[name]


def attributes(gpu: Gpu) -> list[int]:
    """By CUdevice_attribute."""
    values = [0] * 512
    known = {
        1: 1024, 2: 1024, 3: 1024, 4: 64, 5: 2**31 - 1, 6: 65535, 7: 65535, 8: 48 << 10, 10: 32, 12: 65536,
        13: 1_980_000, 16: gpu.multiprocessors,
        36: 2_619_000, 37: 5120, 38: gpu.l2_bytes, 39: 2048, 41: 1, 75: gpu.arch // 10,
        76: gpu.arch % 10, 81: gpu.shared_memory + 1024, 82: 65536, 95: 1, 97: gpu.shared_memory, 106: 32, 111: 1024,
        120: int(gpu.arch >= 90), 127: int(gpu.arch >= 90),
    }  # fmt: skip
    for at, value in known.items():
        values[at] = value
    return values


def cache_folder() -> Path:
    """Where the driver is kept once it is compiled: beside Triton's own caches."""
    folder = Path(knobs.cache.dir) / "fastconv-emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build() -> Path:
    """The folder of a libcuda.so.1, compiled when driver.c is new."""
    source = Path(__file__).with_name("driver.c")
    text = source.read_bytes()
    # cuda.h is Triton's.
    spec = next(
        p for p in map(Path, sys.path) if (p / "triton" / "backends" / "nvidia" / "include" / "cuda.h").exists()
    )
    include = spec / "triton" / "backends" / "nvidia" / "include"
    folder = cache_folder() / hashlib.sha256(text + (include / "cuda.h").read_bytes()).hexdigest()[:16]
    library = folder / "libcuda.so.1"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        temporary = folder / f"libcuda.{os.getpid()}"
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        if compiler is None:
            raise RuntimeError("the emulated driver needs a C compiler: none of cc, gcc, clang is on the PATH")
        how = ["-shared", "-fPIC", "-O1", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
        subprocess.check_call([compiler, *how, str(source), "-o", str(temporary)])
        temporary.rename(library)
    return folder


@dataclass
class Launched:
    """A launch as it was run."""

    name: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    seconds: float
    counters: dict[str, Any] | None = None


@dataclass
class Function:
    name: str
    text: str
    programs: dict[Any, engine.Program] = field(default_factory=dict)


class Driver:
    """One emulated GPU."""

    def __init__(self, gpu: Gpu, options: engine.Options) -> None:
        self.gpu, self.options = gpu, options
        self.allocations = Allocations()
        self.functions: dict[int, Function] = {}
        self.launches: list[Launched] = []
        self.fault: BaseException | None = None  # the latest; a GPU that has met one answers no more
        self.noted: list[Callable[[], object]] | None = None  # launches of the graph that is being captured
        self.emulating = self.estimated = 0.0  # seconds: of the host for launches, and of a GPU for the same
        self.edit: Callable[[str, str], str] | None = None  # of a kernel's name and PTX, before it is parsed
        self._loading = threading.local()
        self._lock = threading.RLock()
        self.folder = build()
        os.environ["TRITON_LIBCUDA_PATH"] = str(self.folder)
        self.library = ctypes.CDLL(str(self.folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
        values = attributes(gpu)
        self.library.emulator_configure(gpu.name.encode(), (ctypes.c_int * len(values))(*values), len(values))
        u64, pointer = ctypes.c_ulonglong, ctypes.c_void_p
        unsigned = ctypes.c_uint
        self._hooks = (
            ctypes.CFUNCTYPE(ctypes.c_int, u64, ctypes.POINTER(unsigned), ctypes.POINTER(unsigned), unsigned, pointer,
                             ctypes.POINTER(pointer), unsigned)(self._launch),
            ctypes.CFUNCTYPE(u64, pointer, ctypes.c_char_p)(self._load),
            ctypes.CFUNCTYPE(ctypes.c_int, u64)(self._accessible),
        )  # fmt: skip
        self.library.emulator_hooks(*self._hooks)
        self.library.emulator_fail.argtypes = [ctypes.c_char_p]

    def loading(self, text: str) -> None:
        """The PTX of the binary that this thread is about to load."""
        self._loading.text = text

    def _load(self, image: int, name: bytes) -> int:
        text = self._loading.text
        number = 0x10000 + 16 * len(self.functions)
        self.functions[number] = Function(name.decode(), text)
        return number

    def _accessible(self, address: int) -> int:
        return 1 if address == 0 or self.allocations.find(address) else 0

    def program(self, function: Function) -> engine.Program:
        options = self.options
        key = (options.late, options.races, options.counters, self.edit)
        found = function.programs.get(key)
        if found is None:
            text = function.text if self.edit is None else self.edit(function.name, function.text)
            kernel = ptx.parse(text)[function.name]
            if kernel.target != self.gpu.arch:
                raise ptx.PtxError(f"{function.name} is compiled for sm_{kernel.target}, the GPU is sm_{self.gpu.arch}")
            found = function.programs[key] = engine.Program(kernel, options)
        found.options = options
        return found

    def _launch(
        self, number: int, grid: Any, block: Any, shared: int, stream: int, parameters: Any, clusters: int
    ) -> int:
        try:
            if clusters != 1:
                raise ptx.PtxError("clusters are not modelled")
            function = self.functions[number]
            kernel = self.program(function).kernel
            raw = np.zeros(max((p.offset + p.size for p in kernel.parameters), default=0), np.uint8)
            for n, p in enumerate(kernel.parameters):
                raw[p.offset : p.offset + p.size] = np.frombuffer(ctypes.string_at(parameters[n], p.size), np.uint8)
            launch = partial(self._run, function, tuple(grid[:3]), math.prod(block[:3]), shared, raw.tobytes())
            if self.noted is not None:
                self.noted.append(launch)
            launch()
            return 0
        except BaseException as error:
            self.fault = error
            # (Triton copies the text into 1024 bytes.)
            self.library.emulator_fail(f"{type(error).__name__}: {error}".encode("ascii", "replace")[:900])
            return LAUNCH_FAILED

    def _run(
        self, function: Function, grid: tuple[int, int, int], threads: int, shared: int, parameters: bytes
    ) -> None:
        with self._lock:
            began = time.perf_counter()
            counters = Counters() if self.options.counters else None
            program = self.program(function)
            engine.Running(program, grid, threads, shared, parameters, self.allocations, counters).run()
            taken = time.perf_counter() - began
            self.emulating += taken
            self.estimated += LAUNCH_SECONDS if counters is None else counters.seconds(self.gpu)
            found = counters and counters.result()
            self.launches.append(Launched(function.name, grid, threads, shared, taken, found))

    def reason(self) -> str:
        self.library.emulator_reason.restype = ctypes.c_char_p
        return self.library.emulator_reason().decode()
