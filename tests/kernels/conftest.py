"""What every test of a kernel shares: what launchers allocate holds nothing that could pass for a result."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill it with NaN, or with a tap that no window here has, so that an element which no program writes fails."""
    for owner, name in ((torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided"), (torch, "empty_like")):
        allocate = getattr(owner, name)

        def poisoned(*a: Any, _allocate: Any = allocate, **options: Any) -> torch.Tensor:
            t = _allocate(*a, **options)
            return t.fill_(torch.nan if t.is_floating_point() else 251)

        monkeypatch.setattr(owner, name, poisoned)
