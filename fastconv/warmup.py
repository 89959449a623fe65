"""Every kernel that a model will need, compiled before it is called: in parallel, and found without computing."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn import Module, SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastconv.autograd.operators import implementations
from fastconv.autotune import Gpu, gpu_named, known_gpus
from fastconv.autotune.choose import MEASURING
from fastconv.explain import _rejoin, _shared
from fastconv.kernels import dispatch, launch, mend
from fastconv.kernels.compile import compile_each, load
from fastconv.settings import settings

log = logging.getLogger("fastconv")
SECONDS = 2.0  # between two lines of progress


@dataclass(frozen=True)
class Warmup:
    """What `warmup` did."""

    kernels: int  # distinct binaries that are launched
    compiled: int  # of these; the others were in Triton's cache
    seconds: float
    gpu: str | None  # None: nothing is launched on a GPU
    note: str | None = None  # why there was nothing to compile, or the model had to be run

    def __str__(self) -> str:
        if self.gpu is None:
            return f"nothing to compile: {self.note}"
        line = f"{self.kernels} kernels for the {self.gpu}: {self.compiled} compiled in {self.seconds:.1f} s"
        return f"{line}, {self.kernels - self.compiled} from Triton's cache" + (f" ({self.note})" if self.note else "")


def warmup(
    model: Module,
    *inputs: Any,
    train: bool = False,
    gpu: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Warmup:
    """Compile every kernel that ``model(*inputs)`` launches, on all cores; with ``train`` its backward pass too.

    Afterwards a first step compiles nothing, a CUDA graph can be captured, and another process finds the kernels in
    Triton's cache. Call it as the model will be called: inside torch.autocast where the model is, with inputs of the
    same shapes, dtypes and memory formats. The model runs once, on a copy without data, in training or inference mode
    as ``train`` says; one that asks for values runs once more on a true copy, and what is left compiles there. Nothing
    of the model changes.

    ``gpu``: "H200" or another of the known ones, in the place of the device that the model is on, which may be the CPU;
    nothing is loaded then. ``progress(done, all)`` is called after each kernel; without it lines go to the log
    "fastconv" at level INFO. Under TRITON_INTERPRET, on a CPU and for a model without fastconv's layers there is
    nothing to compile, as the result and a warning of the log say. Nothing is measured: where settings say "first" or
    "force", the tiles are those of "cached", and the first call measures.

    Raises ValueError on an unknown ``gpu``; RuntimeError where a kernel does not compile, naming it, and while a CUDA
    graph is captured; else what the model raises.
    """
    named = None if gpu is None else gpu_called(gpu)
    if mend.interpreting():
        return _nothing("kernels are interpreted in this process (TRITON_INTERPRET)")
    if isinstance(model, DistributedDataParallel):
        model = model.module
    tensors = [t for t in (*model.parameters(), *model.buffers(), *tree_leaves(inputs)) if isinstance(t, Tensor)]
    devices = list(dict.fromkeys(t.device for t in tensors if t.device.type == "cuda"))
    if named is None and not devices:
        return _nothing("the model and its inputs are on the CPU; gpu= compiles for a GPU that is not here")
    if devices and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("fastconv.warmup compiles, and a CUDA graph is being captured: call it before the capture")
    target = named or dispatch.target(devices[0])
    with contextlib.ExitStack() as looking:
        if named is not None:
            looking.enter_context(dispatch.use_target(named))
        if settings.tune in MEASURING:
            looking.enter_context(settings(tune="cached"))
        records = looking.enter_context(launch.record())
        note = _find(model, inputs, train, named is None)
    launches = list({record.launch.compile_key: record.launch for record in records}.values())
    if not launches:
        return _nothing("the model launches none of fastconv's kernels; fastconv.convert(model) swaps its layers")
    started = time.perf_counter()
    found = compile_each(((it, target) for it in launches), lambda binary: binary.cached, None, progress or _logged())
    for failure in found.failures.values():
        raise RuntimeError(failure)
    if named is None:
        for device in devices:
            load(launches, device)
    new = sum(not cached for cached in found.results.values())
    done = Warmup(len(launches), new, time.perf_counter() - started, target.name, note)
    log.info("warmup: %s", done)
    return done


def gpu_called(name: str) -> Gpu:
    """The known GPU of this name, in any case and without its maker's, or the first of an architecture ``sm_90``; or a
    product of one, by the whole name that its devices have: ``NVIDIA A100-SXM4-80GB``.

    Raises ValueError with the names there are.
    """

    def plain(text: str) -> str:
        return text.lower().replace("nvidia", "").replace("geforce", "").replace(" ", "")

    known = known_gpus()
    for gpu in known:
        if plain(name) in (plain(gpu.name), f"sm_{gpu.arch}"):
            return gpu
    product = gpu_named(name)
    if product is not None:
        return product
    architectures = sorted({gpu.arch for gpu in known})
    names = [*(gpu.name.removeprefix("NVIDIA ") for gpu in known), *(f"sm_{arch}" for arch in architectures)]
    raise ValueError(f"gpu {name!r} is not one of {', '.join(names)}")


def _nothing(why: str) -> Warmup:
    log.warning("warmup: nothing to compile: %s", why)
    return Warmup(0, 0, 0.0, None, why)


def _logged() -> Callable[[int, int], None]:
    """Progress as lines of the log, with the time left."""
    started = last = time.monotonic()

    def tell(done: int, everything: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS and done < everything:
            last = now
            left = (now - started) / done * (everything - done)
            log.info("warmup: %d of %d kernels compiled, about %.0f s left", done, everything, left)

    return tell


def _find(model: Module, inputs: tuple[Any, ...], train: bool, here: bool) -> str | None:
    """Make every call of ``model(*inputs)`` without its launches; ``here``: where that cannot be, with them. Why."""
    mode = FakeTensorMode()
    try:
        with FakeCopyMode(mode):
            duplicate = copy.deepcopy(model, _shared(model))
        for module in duplicate.modules():
            if isinstance(module, _BatchNorm) and module.momentum is None:
                module.momentum = 0.0  # None asks for the value of a count
            if type(module) is SyncBatchNorm:
                _rejoin(module)
        with mode:
            fakes = tree_map_only(Tensor, mode.from_tensor, inputs)
            with _Calls():
                _step(duplicate, fakes, train)
    except Exception as error:  # of any kind: the model may do anything with a tensor that has no values
        if not here:
            raise
        why = f"it ran, since without data it raises {type(error).__name__}: {str(error).splitlines()[0]}"
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            _step(copy.deepcopy(model, _shared(model)), inputs, train)
        return why
    return None


class _Calls(TorchDispatchMode):
    """Inside, fastconv's operators run as they are, down to their launches, on tensors without data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return implementations.get(func, func)(*args, **(kwargs or {}))


def _step(model: Module, inputs: tuple[Any, ...], train: bool) -> None:
    if model.training != train:
        model.train(train)
    # What torch.compile made of a model hides its operators; a mode is seen by the thread that entered it alone.
    one_thread = torch.autograd.set_multithreading_enabled(False)
    with torch.compiler.set_stance("force_eager"), torch.set_grad_enabled(train), one_thread:
        outputs = [y for y in tree_leaves(model(*inputs)) if isinstance(y, Tensor) and y.requires_grad]
        if train and outputs:
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
