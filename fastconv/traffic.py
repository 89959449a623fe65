"""Bytes that a computation reads and writes: fastconv's as launched, PyTorch's own operators' by their arguments.

Counted, not measured: each tensor a kernel is given counts once, whatever caches do. An operator of PyTorch's that
makes two passes over a tensor counts it twice: batch norm in training (statistics, then normalisation; in backward its
two sums, then the gradient) and a convolution's backward (dgrad, then wgrad).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastconv.kernels.launch import Record, record

# The arguments that an operator reads a second time.
_READ_TWICE = {
    "aten::native_batch_norm": (0,),
    "aten::_native_batch_norm_legit": (0,),
    "aten::_native_batch_norm_legit.no_stats": (0,),
    "aten::_batch_norm_with_update": (0,),
    "aten::cudnn_batch_norm": (0,),
    "aten::native_batch_norm_backward": (0, 1),
    "aten::batch_norm_backward": (0, 1),
    "aten::cudnn_batch_norm_backward": (0, 1),
}


class Traffic(TorchDispatchMode):
    """A context that counts: ``kernels`` by the name of our kernels, ``operators`` by that of PyTorch's, in bytes."""

    def __init__(self) -> None:
        super().__init__()
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
        out = func(*args, **(kwargs or {}))
        # Ours are counted where they launch.
        if func.namespace != "fastconv":
            self.operators[func.name()] += _operator_bytes(func, args, kwargs or {}, out)
        return out

    @property
    def kernels(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for launched in self._records:
            found[launched.name] += sum(launched.bytes)
        return found

    @property
    def bytes(self) -> int:
        return sum(self.operators.values()) + sum(self.kernels.values())


def _operator_bytes(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    schema = func._schema
    if any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns):
        return 0  # a view
    read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    # What is written in place is among the arguments, and moves twice; so are outputs of their own once.
    moved = sum(_size(t) for t in read) + sum(_size(t) for t in tree_leaves(out) if isinstance(t, Tensor))
    for index in _READ_TWICE.get(func.name(), ()):
        moved += _size(args[index])
    if func.name() == "aten::convolution_backward" and args[-1][0] and args[-1][1]:
        moved += _size(args[0])
    return moved


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
