"""One family alone, where several would serve a call."""

from __future__ import annotations

import pytest
import torch

import fastconv
import fastconv.functional
from fastconv.kernels import dispatch, launch, mend

pytestmark = pytest.mark.skipif(not mend.interpreting(), reason="runs kernels on the CPU: needs TRITON_INTERPRET=1")


def kernels_of(x: torch.Tensor, weight: torch.Tensor, groups: int) -> set[str]:
    with fastconv.settings(strict=True), launch.record() as records:
        y = fastconv.functional.conv2d(x, weight, padding=1, groups=groups)
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight, padding=1, groups=groups))
    return {record.name for record in records}


def test_one_family_serves_what_another_would_and_then_no_more() -> None:
    x, weight = torch.randn(2, 8, 5, 5), torch.randn(8, 1, 3, 3)
    usual = kernels_of(x, weight, 8)  # which is kept for the next call
    with dispatch.only_family("gather"):
        alone = kernels_of(x, weight, 8)
    assert (usual, alone) == ({"conv_depthwise_kernel"}, {"conv_gather_kernel"})
    assert kernels_of(x, weight, 8) == usual


def test_a_family_alone_says_why_it_does_not_serve() -> None:
    refusal = pytest.raises(RuntimeError, match=r"no kernel for this call \(depthwise: 8 input channels a group\)")
    with dispatch.only_family("depthwise"), refusal:
        kernels_of(torch.randn(2, 8, 5, 5), torch.randn(8, 8, 3, 3), 1)


def test_an_unknown_family_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="depthwise, gather"), dispatch.only_family("winograd"):
        pass
