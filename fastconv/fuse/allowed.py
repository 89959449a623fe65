"""What a forward that is traced may call, and what is known of the results."""

from __future__ import annotations

import operator
from abc import ABCMeta
from collections import OrderedDict
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from fastconv.fuse.stand_ins import Untraceable, Value, class_of

# torch.nn's modules whose result is a tensor whatever they are called with.
GIVE_TENSORS = (
    *(torch.nn.modules.conv._ConvNd, _BatchNorm, torch.nn.Linear, torch.nn.GroupNorm, torch.nn.LayerNorm),
    *(torch.nn.ReLU, torch.nn.Hardtanh, torch.nn.SiLU, torch.nn.GELU, torch.nn.Sigmoid, torch.nn.Hardswish),
    *(torch.nn.AvgPool2d, torch.nn.AdaptiveAvgPool2d, torch.nn.Flatten, torch.nn.Dropout),
)
# Forwards of torch.nn's containers are run like the user's; no other code of torch's is.
CONTAINERS_CODE = torch.nn.Sequential.__module__
# Python's functions that only compute.
PURE = {
    id(function): function
    for function in (
        *(len, range, zip, enumerate, reversed, sorted, min, max, sum, abs, any, all, int, float, bool, round, divmod),
        *(map, filter, slice, list, tuple, dict, set, frozenset, OrderedDict, complex, pow),
    )
}
# Python's functions that write a value as text.
WRITING = {id(function): function for function in (str, repr, format)}
# Methods of containers and strings that change nothing.
READING = frozenset({"copy", "count", "get", "index", "items", "keys", "values"})
# torch's functions that answer by who runs the forward.
STATES = (torch.jit.is_scripting, torch.jit.is_tracing)
MISSING = object()
# Containers that a forward may make and change.
OWN = (list, dict, set, OrderedDict)
# torch's functions that want a list.
JOIN = (torch.cat, torch.concat, torch.concatenate, torch.stack, torch.hstack, torch.vstack, torch.dstack)
# Metaclasses whose isinstance() is Python's own.
ANSWER_TRULY = (type, ABCMeta, type(Tensor), type(torch.nn.Parameter))
# Functions whose result is a tensor if the first operand is.
ARITHMETIC = (
    *(operator.add, operator.sub, operator.mul, operator.truediv),
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv),
)
TORCH = (torch, torch.nn.functional, torch._C._nn, torch.special, torch.fft, torch.linalg)


def forward_of(module: torch.nn.Module) -> Any:
    """What ``module.forward`` would be a method of if nothing were fused."""
    return vars(module).get("forward", getattr(class_of(module), "forward", None))


def is_single(value: Any) -> bool:
    """Whether whatever equals the constant ``value`` is the same object."""
    return value is None or value is ... or type(value) in (bool, torch.dtype, torch.layout, torch.memory_format)


def kind_of(value: Any) -> type | None:
    return value.kind if type(value) is Value else None if isinstance(value, Proxy) else type(value)


def are_distinct(module: torch.nn.Module) -> bool:
    children = module._modules.values()
    return None not in children and len(set(map(id, children))) == len(children)


def is_argument(*values: Any) -> bool:
    return any(type(value) is Value and value.node.op == "placeholder" for value in values)


def is_of(module: ModuleType, function: Any) -> bool:
    """Whether ``module`` holds ``function`` under its name."""
    return getattr(module, getattr(function, "__name__", ""), None) is function and not isinstance(function, type)


def is_torchs(function: FunctionType) -> bool:
    return str(function.__globals__.get("__name__")).split(".")[0] == "torch"


def in_classes(order: tuple[type, ...], name: str, shown: str, *default: Any) -> Any:
    for kind in order:
        if name in vars(kind):
            return vars(kind)[name]
    if default:
        return default[0]
    raise Untraceable(f"reads {shown}, which is not there")


def holds_value(args: Any) -> bool:
    if isinstance(args, dict):
        args = args.values()
    return any(isinstance(arg, Proxy) or (type(arg) in (tuple, list, dict) and holds_value(arg)) for arg in args)
