"""What the functional modules share: why a call is not served, and arguments as torch.nn.functional takes them."""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastconv.kernels import dispatch
from fastconv.kernels.families.family import why_not_gpu
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.device import here
from fastconv.kernels.problem.layout import POINTER_TYPES

Ints = int | Sequence[int]

# Whether kernels take the CPU's tensors: interpreted, or on an emulated GPU.
_ON_CPU = interpreter.interpreting() or here.type == "cpu"
_is_compiling, _transforms = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state
log = logging.getLogger("fastconv")
_INTEGERS: Any = (int, torch.SymInt)
TENSORS = {Tensor, Parameter, type(None)}


def why_not_served(x: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Why PyTorch's own operator takes a call on ``x``, cast to ``dtype`` if there is one; None: fastconv serves it."""
    # The operators' own rules hold for a compiled call, and Dynamo cannot trace the questions below.
    compiling = _is_compiling()
    if compiling:
        if torch.onnx.is_in_onnx_export():
            return "torch.onnx.export knows only PyTorch's operators"
    else:
        if _tracing() is not None:
            return "torch.jit.trace records only PyTorch's operators"
        if _transforms():
            return "a transform of torch.func is active"
        if forward_ad._current_level >= 0:
            return "forward-mode differentiation is active"
    dtype = dtype or x.dtype
    if dtype not in POINTER_TYPES:
        return f"{dtype} is not one of float32, float16, bfloat16"
    if x.layout is not torch.strided:
        return f"its layout is {x.layout}"
    if x.is_cuda:
        return _why_not_build() if compiling or dispatch.is_forced() else _why_not_gpu(x.get_device())
    # A tensor without data stands for one on the GPU that calls are planned for.
    if x.is_cpu and (_ON_CPU or (dispatch.is_forced() and isinstance(x, FakeTensor))):
        return None
    return f"its device is {x.device.type}" + (" (and TRITON_INTERPRET is not set)" if x.is_cpu else "")


def autocast_dtype(x: Any) -> torch.dtype | None:
    """What autocast casts a convolution's arguments to, None if it leaves them."""
    # Autocast raises on a device that it does not know, for example meta.
    if not isinstance(x, Tensor) or x.dtype not in POINTER_TYPES:
        return None
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else None
    return torch.get_autocast_dtype(device) if device and torch.is_autocast_enabled(device) else None


def _why_not_build() -> str | None:
    if torch.version.hip is not None:
        return "this PyTorch is built for AMD's GPUs, the kernels are for NVIDIA's"
    return None if torch.version.cuda is not None else "this PyTorch is built without CUDA"


@cache
def _why_not_gpu(index: int) -> str | None:
    """Why PyTorch's own operators serve every call on the GPU of this index, or None. Warns once."""
    reason = _why_not_build()
    # If there is no GPU, a tensor on one has no data.
    if reason is None and here.is_available():
        reason = why_not_gpu(dispatch.target(torch.device("cuda", index)))
    if reason is not None:
        log.warning("PyTorch's own ops run on cuda:%d: %s", index, reason)
    return reason


def expand(name: str, value: Any, rank: int, of: str = "the convolution dimensions") -> tuple[int, ...]:
    """An int, or a sequence of one or ``rank`` ints, as a tuple of ``rank`` ints; `integer` says what is an int."""
    if type(value) is int:
        return (value,) * rank
    # PyTorch takes no other sequences.
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(type(item) is int for item in values):
        values = tuple(integer(name, item) for item in values)
    if len(values) == 1:
        return values * rank
    if len(values) != rank:
        raise RuntimeError(
            f"expected {name} to be a single integer value or a list of {rank} values to match {of}, "
            f"but got {name}={list(values)}"
        )
    return values


def integer(name: str, value: Any) -> Any:
    """A value that can be an index, as an int or SymInt. TypeError for anything else, also a bool, as in PyTorch."""
    if isinstance(value, _INTEGERS) and not isinstance(value, bool):
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, but got {value!r}")
    return operator.index(value)


def boolean(name: str, value: Any) -> bool:
    """``value`` if it is a bool; else TypeError, as in PyTorch."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, but got {value!r}")
    return value


def check_tensors(*values: Any) -> None:
    """Raise TypeError if a value is neither a tensor nor None."""
    if not TENSORS.issuperset(map(type, values)):
        for value in values:
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"expected a Tensor, but got {value!r}")
