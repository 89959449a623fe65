"""Bytes that a computation reads and writes: fastconv's as launched, PyTorch's own operators' by their arguments.

They are counted, not measured: each tensor that a kernel gets counts once, whatever caches do. An operator of PyTorch's
that makes two passes over a tensor counts it twice: batch norm in training (statistics, then normalisation; in backward
its two sums, then the gradient) and a convolution's backward (dgrad, then wgrad). Tensors may be without data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastconv.autotune import Choice
from fastconv.kernels.dispatch import Plan
from fastconv.kernels.launch.launch import LaunchRecord, decisions, record

# What each operator of fastconv's runs, which `fastconv.autograd` fills in. Called directly it runs on tensors without
# data too, for which PyTorch's dispatcher would call the operator's fake.
implementations: dict[Any, Callable[..., Any]] = {}
# Names of the passes around a convolution's three directions and a pool's two; others keep the operator's name.
_NAMES = {
    "batch_norm_act": "apply",
    "batch_norm_act_sums": "sums",
    "batch_norm_act_gradient": "gradient",
    "channel_sum": "bias",
    "max_pool_indices": "indices",
}
# Batch norm, with the argument that says whether its statistics are the batch's, and its backward.
_NORMS = {
    "aten::native_batch_norm": 5,
    "aten::_native_batch_norm_legit": 5,
    "aten::_native_batch_norm_legit.no_stats": 3,
    "aten::cudnn_batch_norm": 5,
}
_NORM_BACKWARDS = ("aten::native_batch_norm_backward", "aten::batch_norm_backward")
# Operators that read nothing of the argument whose shape or memory they take.
_WRITES = ("aten::copy_", "aten::zero_", "aten::fill_.Scalar", "aten::zeros_like", "aten::ones_like", "aten::new_zeros")
# Operators that only reserve memory, and questions about a tensor that read no values.
_NOTHING = ("aten::empty", "aten::new_empty", "prim::")


@dataclass(frozen=True)
class OperatorPass:
    """One call of an operator of fastconv's: what was decided for it, what it launched, what else ran inside."""

    operator: str  # "conv_fprop"
    plan: Plan | None  # of a convolution or a pool
    choice: Choice | None  # the tile; None: PyTorch's own operators do it
    launches: tuple[LaunchRecord, ...]
    operators: Counter[str]  # PyTorch's: copies to another memory format, or the whole call if no kernel serves it

    @property
    def name(self) -> str:
        """fprop, dgrad, wgrad, the same with statistics, apply, sums, gradient, bias; a pool's forward, backward,
        indices."""
        if self.plan is None or self.operator in _NAMES:
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
        self.passes: list[OperatorPass] = []
        self.operators: Counter[str] = Counter()
        self._recording = record()
        self._records: list[LaunchRecord] = []

    def __enter__(self) -> Traffic:
        self._records = self._recording.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._recording.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in implementations:
            # Not through the dispatcher: what runs inside counts too.
            with Traffic() as inside, decisions() as decided:
                out = implementations[func](*args, **(kwargs or {}))
            plan = next((found for found in decided if isinstance(found, Plan)), None)
            choice = next((found for found in decided if isinstance(found, Choice)), None)
            operator = func.name().removeprefix("fastconv::")
            self.passes.append(OperatorPass(operator, plan, choice, tuple(inside._records), inside.operators))
            self.operators += inside.operators
            return out
        out = func(*args, **(kwargs or {}))
        moved = _operator_bytes(func, args, kwargs or {}, out)
        if moved:
            self.operators[func.name()] += moved
        return out

    @property
    def kernels(self) -> Counter[str]:
        """Bytes by the name of fastconv's kernels."""
        found: Counter[str] = Counter()
        for launched in self._records:
            found[launched.name] += sum(launched.bytes)
        return found

    @property
    def bytes(self) -> int:
        return sum(self.operators.values()) + sum(self.kernels.values())


def _operator_bytes(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    name = func.name()
    if name.startswith(_NOTHING):
        return 0
    if any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns):
        return 0  # a view
    read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    # A tensor written in place is among the arguments too, and moves twice; another output moves once.
    moved = sum(_size(t) for t in read) + sum(_size(t) for t in tree_leaves(out) if isinstance(t, Tensor))
    for index, times in _further_reads(name, args).items():
        moved += times * _size(args[index])
    return moved


def _further_reads(name: str, args: Any) -> dict[int, int]:
    """By the index of an argument: how many more times than once the operator reads it; -1: it does not read it."""
    if name in _WRITES:
        return {0: -1}
    if "pool" in name and "_backward" in name:
        return {1: -1}  # they take only the input's shape
    if name in _NORMS:
        return {0: 1} if args[_NORMS[name]] else {}
    if name == "aten::_batch_norm_with_update":
        return {0: 1}
    if name == "aten::cudnn_batch_norm_backward":
        return {0: 1, 1: 1}
    if name in _NORM_BACKWARDS:
        training, (need_x, *need_sums) = args[7], args[9]
        # With constant statistics the input's gradient needs no sums, and no input.
        passes = need_x + any(need_sums)
        return {0: 1, 1: 1} if training else {0: passes - 1, 1: any(need_sums) - 1}
    if name == "aten::convolution_backward":
        return {0: 1} if args[-1][0] and args[-1][1] else {}
    return {}


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
