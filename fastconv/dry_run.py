"""Runs a model on a copy without data: its calls are made down to their launches, and nothing is computed or sent."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn import Module, SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastconv.kernels.launch.device import here
from fastconv.nn.fused_call import process_group
from fastconv.traffic import implementations


def make_calls(model: Module, inputs: tuple[Any, ...], train: bool, may_compute: bool) -> str | None:
    """Make every call of ``model(*inputs)``, and of its backward pass with ``train``, without data.

    A model that asks for values runs on a true copy if it ``may_compute``, and the result says why; else its own
    exception is raised. Nothing of the model changes.
    """
    mode = FakeTensorMode()
    try:
        duplicate = copied(model, mode)
        for norm in settled(duplicate):
            rejoined(norm)
        with mode:
            fakes = tree_map_only(Tensor, mode.from_tensor, inputs)
            with OurOperators():
                _step(duplicate, fakes, train)
    except Exception as error:  # of any kind: the model may do anything with a tensor that has no values
        if not may_compute:
            raise
        why = f"it ran, since without data it raises {type(error).__name__}: {str(error).splitlines()[0]}"
        with here.fork_rng():
            _step(copied(model), inputs, train)
        return why
    return None


class OurOperators(TorchDispatchMode):
    """Inside, fastconv's operators run their own code, down to the launches, on tensors without data too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return implementations.get(func, func)(*args, **(kwargs or {}))


def copied(model: Module, mode: FakeTensorMode | None = None) -> Module:
    """A copy of ``model``, without data if it is for ``mode``; it shares process groups, which cannot be copied."""
    groups = [getattr(module, "process_group", None) for module in model.modules()]
    with contextlib.nullcontext() if mode is None else FakeCopyMode(mode):
        return copy.deepcopy(model, {id(group): group for group in groups if group is not None})


def settled(model: Module) -> list[SyncBatchNorm]:
    """Let ``model``'s batch norms ask for no tensor's value; returns those that ask other processes."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.momentum is None:
            module.momentum = 0.0  # None asks for the value of a count
    return [module for module in model.modules() if type(module) is SyncBatchNorm]


class AloneSyncBatchNorm(SyncBatchNorm):
    """Takes its statistics as if its process was the only one, on any device."""

    forward = _BatchNorm.forward

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def rejoined(norm: Any) -> int:
    """Let ``norm`` take its statistics with other processes, but send nothing; returns how many processes there are."""
    norm.__class__ = SyncBatchNorm
    group = process_group(norm)
    if group is None:
        return 1
    norm.process_group = _SilentGroup(torch.distributed.get_world_size(group))
    return norm.process_group.size()


class _SilentGroup:
    """A process group that sends nothing."""

    def __init__(self, processes: int) -> None:
        self.processes = processes

    def size(self) -> int:
        return self.processes

    def allgather(self, *_: Any) -> None:
        pass

    allreduce = allgather


def _step(model: Module, inputs: tuple[Any, ...], train: bool) -> None:
    if model.training != train:
        model.train(train)
    # What torch.compile made of a model hides its operators. A mode is seen only by the thread that entered it.
    one_thread = torch.autograd.set_multithreading_enabled(False)
    with torch.compiler.set_stance("force_eager"), torch.set_grad_enabled(train), one_thread:
        outputs = [y for y in tree_leaves(model(*inputs)) if isinstance(y, Tensor) and y.requires_grad]
        if train and outputs:
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
