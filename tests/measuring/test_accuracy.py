"""Errors and what is allowed of them; the precision of fp32 convolutions."""

import math

import pytest
import torch

from fastconv.measuring import accuracy


def test_a_nan_is_never_acceptable() -> None:
    exact, nan = torch.ones(4), torch.tensor([1.0, 1.0, math.nan, 1.0])
    assert math.isnan(accuracy.max_error(nan, exact))
    (row,) = accuracy.against_yardstick({"y": nan}, {"y": exact}, {"y": exact}, torch.float32)
    assert not row["right"]
    (row,) = accuracy.against_yardstick({"y": exact}, {"y": nan}, {"y": exact}, torch.float32)
    assert not row["right"]


def test_without_a_yardstick_one_convolutions_error_is_allowed() -> None:
    exact = torch.ones(4)
    for factor, right in ((1 + 2**-8, True), (1 + 2**-6, False), (math.nan, False)):
        (row,) = accuracy.against_yardstick({"y": factor * exact}, None, {"y": exact}, torch.bfloat16)
        assert (row["right"], row["eager"]) == (right, None)
    with accuracy.fp32_convolutions("tf32"):
        (rounded,) = accuracy.against_yardstick({"y": (1 + 2**-11) * exact}, None, {"y": exact}, torch.float32)
    with accuracy.fp32_convolutions("ieee"):
        (wrong,) = accuracy.against_yardstick({"y": (1 + 2**-11) * exact}, None, {"y": exact}, torch.float32)
    assert (rounded["right"], wrong["right"]) == (True, False)


def test_errors_of_an_empty_and_of_a_zero_reference() -> None:
    assert accuracy.max_error(torch.empty(0), torch.empty(0)) == 0.0
    assert accuracy.max_error(torch.full((3,), 0.5), torch.zeros(3)) == 0.5
    assert accuracy.norm_error(torch.tensor([3.0, 4.0]), torch.zeros(2)) == 5.0


def test_the_precision_of_fp32_convolutions_is_put_back() -> None:
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    with pytest.raises(ValueError), accuracy.fp32_convolutions("ieee"):
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"  # type: ignore[attr-defined]
        raise ValueError
    assert torch.backends.cudnn.conv.fp32_precision == before  # type: ignore[attr-defined]
