"""What launchers allocate holds nothing that could pass for a result, and kernels touch nothing but their operands."""

from collections import Counter
from typing import Any

import pytest
import torch

from fastconv.kernels.launch import interpreter

# How often each kernel was launched under `guarded_memory`.
guarded: Counter[str] = Counter()


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill it with NaN, or with a tap that no window here has, so that an element which no program writes fails."""
    for owner, name in ((torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided"), (torch, "empty_like")):
        allocate = getattr(owner, name)

        def poisoned(*a: Any, _allocate: Any = allocate, **options: Any) -> torch.Tensor:
            t = _allocate(*a, **options)
            return t.fill_(torch.nan if t.is_floating_point() else 251)

        monkeypatch.setattr(owner, name, poisoned)


@pytest.fixture
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no interpreted load or store leave the operands of its launch, those of bulk copies neither. What is read
    beside them is no result's part and no comparison sees it, but on a GPU it may be nobody's memory."""
    if not interpreter.interpreting():
        return
    from triton.runtime import interpreter as tritons

    operands: list[tuple[int, int]] = []
    launch, builder = tritons.GridExecutor.__call__, tritons.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def noted(self: Any, *arguments: Any, **options: Any) -> None:
        values = [value for it in arguments for value in (it if isinstance(it, tuple) else (it,))]
        # A descriptor's tensor is its base.
        tensors = [getattr(value, "base", value) for value in values]
        tensors = [t for t in tensors if isinstance(t, torch.Tensor) and t.numel()]
        last = [sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) for t in tensors]
        operands[:] = [(t.data_ptr(), t.data_ptr() + at * t.itemsize) for t, at in zip(tensors, last, strict=True)]
        guarded[self.fn.__name__] += 1
        launch(self, *arguments, **options)

    def check(pointers: Any, mask: Any) -> None:
        touched = pointers.data[mask.data]
        if touched.size:
            low, high = touched.min(), touched.max()
            assert any(first <= low and high <= last for first, last in operands), "memory of no operand's"

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    monkeypatch.setattr(tritons.GridExecutor, "__call__", noted)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
