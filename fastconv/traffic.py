"""Bytes that a computation reads and writes: fastconv's as launched, PyTorch's own operators' by their arguments.

Counted, not measured: each tensor a kernel is given counts once, whatever caches do. An operator of PyTorch's that
makes two passes over a tensor counts it twice: batch norm in training (statistics, then normalisation; in backward its
two sums, then the gradient) and a convolution's backward (dgrad, then wgrad). Tensors may be without data.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastconv.autograd.conv import implementations
from fastconv.autotune import Choice
from fastconv.kernels.dispatch import Plan
from fastconv.kernels.launch import Record, decisions, record

# What the operators do around a convolution's three directions; any other goes by its own name.
_NAMES = {
    "batch_norm_act": "apply",
    "batch_norm_act_sums": "sums",
    "batch_norm_act_gradient": "gradient",
    "channel_sum": "bias",
}
# How often an operator reads an argument, where that is not once.
_READS = {
    **dict.fromkeys(
        (
            "aten::native_batch_norm",
            "aten::_native_batch_norm_legit",
            "aten::_native_batch_norm_legit.no_stats",
            "aten::_batch_norm_with_update",
            "aten::cudnn_batch_norm",
        ),
        {0: 2},
    ),
    **dict.fromkeys(
        ("aten::native_batch_norm_backward", "aten::batch_norm_backward", "aten::cudnn_batch_norm_backward"),
        {0: 2, 1: 2},
    ),
    **dict.fromkeys(
        ("aten::copy_", "aten::zero_", "aten::fill_.Scalar", "aten::zeros_like", "aten::ones_like", "aten::new_zeros"),
        {0: 0},
    ),
}
# Memory that is only reserved.
_RESERVES = ("aten::empty", "aten::new_empty")


@dataclass(frozen=True)
class Pass:
    """One call of an operator of fastconv's: what was decided for it, what it launched, what else ran inside."""

    operator: str  # "conv_fprop"
    plan: Plan | None  # of a convolution
    choice: Choice | None  # the tile; None where PyTorch's own operators do it
    launches: tuple[Record, ...]
    operators: Counter[str]  # PyTorch's: copies to another memory format, or all of it where no kernel serves the call

    @property
    def name(self) -> str:
        """fprop, dgrad, wgrad, the same with statistics, apply, sums, gradient, bias."""
        if self.plan is None:
            return _NAMES.get(self.operator, self.operator)
        return self.plan.direction + (", statistics" if self.operator == "conv_statistics" else "")

    @property
    def bytes(self) -> int:
        return sum(sum(launched.bytes) for launched in self.launches) + sum(self.operators.values())


class Traffic(TorchDispatchMode):
    """A context that counts bytes: fastconv's operators one by one in ``passes``, PyTorch's own by name in
    ``operators``, among them those that ran inside fastconv's."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[Pass] = []
        self.operators: Counter[str] = Counter()
        self._recording = record()
        self._records: list[Record] = []

    def __enter__(self) -> Traffic:
        self._records = self._recording.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._recording.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in implementations:
            # Not through the dispatcher: what it runs inside is to be counted too.
            with Traffic() as inside, decisions() as decided:
                out = implementations[func](*args, **(kwargs or {}))
            plan = next((found for found in decided if isinstance(found, Plan)), None)
            choice = next((found for found in decided if isinstance(found, Choice)), None)
            operator = func.name().removeprefix("fastconv::")
            self.passes.append(Pass(operator, plan, choice, tuple(inside._records), inside.operators))
            self.operators += inside.operators
            return out
        out = func(*args, **(kwargs or {}))
        moved = _operator_bytes(func, args, kwargs or {}, out)
        if moved:
            self.operators[func.name()] += moved
        return out

    @property
    def kernels(self) -> Counter[str]:
        """By the name of our kernels."""
        found: Counter[str] = Counter()
        for launched in self._records:
            found[launched.name] += sum(launched.bytes)
        return found

    @property
    def bytes(self) -> int:
        return sum(self.operators.values()) + sum(self.kernels.values())


def _operator_bytes(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    name = func.name()
    if name.startswith(_RESERVES):
        return 0
    if any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns):
        return 0  # a view
    read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    # What is written in place is among the arguments, and moves twice; so are outputs of their own once.
    moved = sum(_size(t) for t in read) + sum(_size(t) for t in tree_leaves(out) if isinstance(t, Tensor))
    for index, times in _READS.get(name, {}).items():
        moved += (times - 1) * _size(args[index])
    if name == "aten::convolution_backward" and args[-1][0] and args[-1][1]:
        moved += _size(args[0])
    return moved


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
