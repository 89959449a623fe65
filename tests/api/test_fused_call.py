"""Fused calls: arguments, and batch norm as torch.nn's.

The fused call is replaced by PyTorch's own operators, so that every value here is compared bit for bit.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastconv
from fusing import BN1, BN2, DEVICE, Block, assert_same, by_type, images, pair, plain_block
from plainly import fused_by_torch
from tests.marks import runs_kernels

pytestmark = runs_kernels


# Arguments


class Optional(Block):
    def forward(self, x: Tensor, residual: Tensor | None = None, *, scale: int = 1) -> Tensor:
        y = self.bn1(self.conv1(x))
        return self.relu(y if residual is None else y + residual) * scale


def test_optional_arguments(calls: list[Any]) -> None:
    model, plain = pair(Optional(plain_block))
    x = images()
    assert torch.equal(model(x), plain(x)) and len(calls) == 1
    assert torch.equal(model(x, x), plain(x, x)) and calls == [("ReLU", None), ("ReLU", "before")]
    assert torch.equal(model(x, None), plain(x, None))
    assert torch.equal(model(x=x), plain(x=x)) and len(calls) == 4
    assert torch.equal(model(residual=x, x=x), plain(x, x)) and calls[4:] == [("ReLU", "before")]
    assert torch.equal(model(x, residual=x, scale=2), plain(x, x, scale=2))
    assert len(calls) == 5
    for wrong in ({}, {"residual": x}, {"x": x, "other": x}):
        with pytest.raises(TypeError):
            model(**wrong)


def test_lists(calls: list[Any]) -> None:
    model, plain = pair(Block(by_type))
    halves = [images(2, 1, 5, 6), images(2, 3, 5, 6)]
    assert_same(model, plain, halves)
    assert len(calls) == 1
    plain.eval()
    assert_same(model, plain, halves)
    assert len(calls) == 2
    assert torch.equal(model(tuple(halves)), plain(tuple(halves))) and len(calls) == 2


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "groups": 2},
        {"kernel_size": 3, "padding": "same", "bias": False},
        {"kernel_size": 2, "padding": "valid"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"},
    ],
    ids=str,
)
def test_convolutions_arguments(rank: int, arguments: dict[str, Any], calls: list[Any]) -> None:
    conv = getattr(nn, f"Conv{rank}d")(4, 4, **arguments)
    model, plain = pair(nn.Sequential(conv, getattr(nn, f"BatchNorm{rank}d")(4), nn.ReLU6()))
    assert_same(model, plain, images(2, 4, *[6] * rank))
    assert calls == [("ReLU6", None)]


@pytest.mark.parametrize("arguments", [{"stride": 2, "padding": 1}, {"padding": "same"}, {"padding": "valid"}], ids=str)
def test_a_residual_of_the_results_shape(arguments: dict[str, Any], calls: list[Any]) -> None:
    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.short = nn.Conv2d(4, 4, 3, **arguments), nn.Conv2d(4, 4, 3, **arguments)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            short = self.short(x)
            return F.hardswish(self.bn(self.conv(x)) + short)

    model, plain = pair(Add())
    assert_same(model, plain, images())
    assert calls == [("Hardswish", "before")]


# Batch norm as torch.nn's


@pytest.mark.parametrize(
    "arguments",
    [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 0.3, "eps": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm], ids=lambda norm: norm.__name__)
def test_batch_norms_arguments(arguments: dict[str, Any], norm: Any, calls: list[Any]) -> None:
    model, plain = pair(nn.Sequential(nn.Conv2d(4, 4, 3), norm(4, **arguments), nn.ReLU()))
    for _ in range(2):
        assert_same(model, plain, images())
    for change in ("eval", "frozen", "frozen weights"):
        model.train(), plain.train()
        for m in (model, plain):
            if change == "eval":
                m.eval()
            elif change == "frozen":
                m[1].eval()
            else:
                m.requires_grad_(False)
        for a, b in zip((model(images()), *model.buffers()), (plain(images()), *plain.buffers()), strict=True):
            assert torch.equal(a, b)
    assert len(calls) == 5


def test_statistics_are_kept_by_the_module(calls: list[Any]) -> None:
    model, plain = pair(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    model(images()), plain(images())
    # As users do: forgetting what was tracked, and stopping to track.
    for m in (model, plain):
        m[1].reset_running_stats()
        m[1].track_running_stats = False
    model(images()), plain(images())
    assert len(calls) == 2
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


def test_a_synchronised_norm_takes_statistics_over_its_group(monkeypatch) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(fastconv.convert(Block(plain_block)), "the group").to(DEVICE)
    assert fastconv.report(model).fused == [f"{BN1} + relu", f"{BN2} + residual + relu"]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2 if group == "the group" else 1)
    with fused_by_torch(lambda args: args[15]) as groups:
        model(images())
        model.eval()
        model(images())
        model.train()
        model.bn1.process_group = "another, of one"
        model(images())
    assert groups == ["the group"] * 2 + [None] * 2 + [None, "the group"]


def test_one_value_per_channel_raises_as_torch_does() -> None:
    model = fastconv.convert(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).to(DEVICE)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model(images(1, 4, 1, 1))


@pytest.mark.parametrize("shape", [(4, 5, 6), (2, 3, 5, 6)], ids=str)
def test_bad_input_raises_as_torch_does(shape: tuple[int, ...]) -> None:
    model, plain = pair(Block(plain_block))
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        plain(images(*shape))
    with pytest.raises(type(theirs.value)):
        model(images(*shape))


def test_other_dtypes_are_the_modules_own(calls: list[Any]) -> None:
    model, plain = pair(Block(plain_block).double())
    x = images().double()
    assert torch.equal(model(x), plain(x))
    assert not calls


def test_autocast(calls: list[Any]) -> None:
    model, plain = pair(Block(plain_block))
    x = images()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_same(model, plain, x)
    # The shortcut is fp32, so that the sum is not the fused call's.
    assert calls == [("ReLU", None), (None, None)]
