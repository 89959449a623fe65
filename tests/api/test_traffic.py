"""Bytes counted by hand for a ResNet bottleneck, in units of one narrow activation, against what is counted."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from torch._subclasses.fake_tensor import FakeTensorMode

import fastconv.functional as ours
from fastconv.autotune.gpus import INTERPRETER
from fastconv.explain import Moved, explain
from fastconv.kernels.dispatch import only_family, use_target
from fastconv.traffic import Traffic
from tests.marks import DEVICE, runs_kernels
from tests.tiles import take_tile

pytestmark = runs_kernels
WIDTH, BATCH, SIZE = 16, 8, 16
UNIT = BATCH * SIZE * SIZE * WIDTH * 2  # bytes of the narrow activation in bfloat16
LAYERS = ((4 * WIDTH, WIDTH, 1), (WIDTH, WIDTH, 3), (WIDTH, 4 * WIDTH, 1))


def nhwc(t: torch.Tensor) -> torch.Tensor:
    return t.bfloat16().to(DEVICE).contiguous(memory_format=torch.channels_last)


def bottleneck(x: torch.Tensor, weights: list[torch.Tensor], fused: bool) -> torch.Tensor:
    """conv-BN-ReLU twice, then conv-BN-add-ReLU, in place if eager can."""
    h = x
    for index, weight in enumerate(weights):
        k = weight.shape[0]
        gamma, beta = (
            torch.ones(k, device=DEVICE, requires_grad=True),
            torch.zeros(k, device=DEVICE, requires_grad=True),
        )
        norm = gamma, beta, torch.zeros(k, device=DEVICE), torch.ones(k, device=DEVICE)
        padding, last = weight.shape[-1] // 2, index == 2
        if fused:
            options: dict[str, Any] = {"training": True, "momentum": 0.1, "eps": 1e-5, "padding": padding}
            h = ours.conv2d_bn_act(h, weight, None, *norm, **options, residual=x if last else None)
        else:
            h = theirs.batch_norm(theirs.conv2d(h, weight, padding=padding), norm[2], norm[3], *norm[:2], True)
            h = theirs.relu_(h + x if last else h)
    return h


def units(fused: bool) -> tuple[float, float]:
    """Activations moved in forward and in backward."""
    generator = torch.Generator().manual_seed(0)
    weights = [nhwc(torch.randn(k, c, r, r, generator=generator)).requires_grad_() for c, k, r in LAYERS]
    x = nhwc(torch.randn(BATCH, 4 * WIDTH, SIZE, SIZE, generator=generator)).requires_grad_()
    with Traffic() as forward:
        z = bottleneck(x, weights, fused)
    dz = torch.ones_like(z)
    with Traffic() as backward:
        torch.autograd.grad(z, (x, *weights), dz)
    of_weights = sum(w.numel() for w in weights) * 2
    # Each direction of each convolution moves its weight or its gradient once.
    return (forward.bytes - of_weights) / UNIT, (backward.bytes - 2 * of_weights) / UNIT


@pytest.fixture
def one_program_a_sum(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU would split the sums of so small a layer among programs, which meet in a workspace."""
    tile = {"BLOCK_M": 256, "BLOCK_K": 64, "BLOCK_C": 32, "SPLITS": 1, "num_warps": 8}
    take_tile(monkeypatch, tile, ("conv", "pass"))
    with only_family("gather"):
        yield


@pytest.mark.usefixtures("one_program_a_sum")
def test_a_fused_bottleneck_moves_what_was_counted_by_hand() -> None:
    forward, backward = units(fused=True)
    # Convolutions 12, normalise + activate 4 + 12 with the join; sums 4 + 12 (z for the mask), gradients 6 + 20, dgrad
    # and wgrad 12 each, the shortcut's gradient added 12.
    assert forward == pytest.approx(28, abs=0.3)
    assert backward == pytest.approx(78, abs=0.3)


def test_an_eager_bottleneck_moves_what_was_counted_by_hand() -> None:
    forward, backward = units(fused=False)
    # Convolutions 12, batch norm 18, ReLU 12, the join 12; ReLU 18, batch norm 30, dgrad and wgrad 24, the join 12.
    assert forward == pytest.approx(54, abs=0.3)
    assert backward == pytest.approx(84, abs=0.3)


@pytest.mark.usefixtures("one_program_a_sum")
def test_a_fused_bottleneck_moves_at_most_four_fifths_of_eagers_bytes() -> None:
    assert sum(units(fused=True)) <= 0.8 * sum(units(fused=False))


def test_views_move_nothing_and_in_place_counts_twice() -> None:
    x = torch.zeros(10, device=DEVICE)
    with Traffic() as traffic:
        x.view(2, 5).t()
    assert traffic.bytes == 0
    with Traffic() as traffic:
        x.relu_()
    assert traffic.bytes == 80
    assert list(traffic.operators) == ["aten::relu_"]


class Bottleneck(torch.nn.Module):
    """As torchvision's, with an identity as its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        for index, (c, k, r) in enumerate(LAYERS, 1):
            setattr(self, f"conv{index}", torch.nn.Conv2d(c, k, r, padding=r // 2, bias=False))
            setattr(self, f"bn{index}", torch.nn.BatchNorm2d(k))
        self.relu = torch.nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x
        return self.relu(out)


def test_explain_counts_the_same() -> None:
    model = Bottleneck().bfloat16().to(DEVICE, memory_format=torch.channels_last)
    # Whose tiles split no sum, which would move partial ones.
    with use_target(INTERPRETER):
        found = explain(model, nhwc(torch.randn(BATCH, 4 * WIDTH, SIZE, SIZE)).requires_grad_())
    of_weights = sum(c * k * r * r for c, k, r in LAYERS) * 2

    def in_units(moved: Moved) -> tuple[float, float]:
        return (moved.forward - of_weights) / UNIT, (moved.backward - 2 * of_weights) / UNIT

    # The join of the shortcut's gradient is missing: it belongs to neither fused layer.
    assert in_units(found.moved) == pytest.approx((28, 66), abs=0.3)
    assert in_units(found.pytorch_moved) == pytest.approx((54, 72), abs=0.3)
    assert found.moved.total <= 0.8 * found.pytorch_moved.total


def test_copies_inside_our_operators_are_counted() -> None:
    x, weight = torch.randn(2, 8, 4, 4, device=DEVICE), torch.randn(8, 8, 1, 1, device=DEVICE)
    mode = FakeTensorMode()
    with Traffic() as traffic, mode:
        ours.conv2d(mode.from_tensor(x), mode.from_tensor(weight))
    (convolution,) = traffic.passes
    # To channels_last and back; a 1x1 weight is in both formats.
    assert traffic.operators == convolution.operators == {"aten::copy_": 4 * x.nbytes}
    assert sum(traffic.kernels.values()) == 2 * x.nbytes + weight.nbytes


def test_what_batch_norm_reads() -> None:
    x = torch.zeros(2, 8, 4, 4, device=DEVICE, requires_grad=True)
    expected = {(True, True): (3, 5), (False, True): (2, 4), (False, False): (2, 2)}
    for (training, affine), units in expected.items():
        norm = torch.nn.BatchNorm2d(8, affine=affine).to(DEVICE).train(training)
        with Traffic() as forward:
            z = norm(x)
        with Traffic() as backward:
            torch.autograd.grad(z, (x, *norm.parameters()), torch.ones_like(z))
        moved = [traffic.bytes / x.nbytes for traffic in (forward, backward)]
        assert moved[0] == pytest.approx(units[0], abs=0.3)
        # And the gradient of ones, which is written.
        assert moved[1] == pytest.approx(units[1] + 1, abs=0.3)
