"""LeNet-5, blocks and networks compared: right with our kernels, wrong without them or with wrong ones, interpreted."""

from typing import Any

import pytest
import torch
from torch import nn

import fastconv
import fastconv.functional
from fastconv.benchmarks import models
from fastconv.benchmarks.measure import lenet, network, resnet_blocks
from fastconv.cli import run
from tests.marks import interpreted

pytestmark = interpreted
CPU = torch.device("cpu")
CONVERT = fastconv.convert


def not_converted(model: nn.Module, **options: Any) -> nn.Module:
    return model


def wrongly_converted(model: nn.Module, **options: Any) -> nn.Module:
    """Converted, with the channels of every result in reverse order."""
    model = CONVERT(model, **options)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda module, inputs, output: output.flip(1))
    return model


@pytest.fixture(params=[not_converted, wrongly_converted])
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of what is wrong with ``fastconv.convert`` during the test."""
    monkeypatch.setattr(fastconv, "convert", request.param)
    return request.param.__name__


def test_lenet_trains_alike_converted() -> None:
    ticks: list[int] = []
    part = lenet.run(3, lambda: ticks.append(1))
    assert part["verdict"] == "right"
    assert len(ticks) == 3
    assert part["loss_difference"] < 1e-6
    # Two convolutions forward, of exact products; backward skips the gradient of the images.
    assert part["launches"]["conv_gather_kernel"] == 3 * 3
    assert part["launches"]["conv_wgrad_kernel"] == 3 * 2


def test_lenet_finds_what_is_broken(broken: str) -> None:
    part = lenet.run(3)
    assert part["verdict"] == "wrong"
    assert ("no kernel" if broken == "not_converted" else "losses differ") in part["reason"]


def test_lenet_asks_for_accuracy_only_of_a_whole_run(monkeypatch) -> None:
    monkeypatch.setattr(lenet, "STEPS", 2)
    part = lenet.run(2)
    assert part["verdict"] == "wrong"
    assert part["reason"] == "accuracy is not over 60%"


def test_digits_are_the_real_ones() -> None:
    images, labels = lenet.digits()
    assert images.shape == (1797, 1, 12, 12)
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert images.mean().abs() < 1e-5


@pytest.fixture
def small_photograph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnet_blocks, "CROP", 64)


@pytest.mark.usefixtures("small_photograph")
def test_both_blocks_are_right_in_every_tensor() -> None:
    parts = resnet_blocks.run([torch.float32, torch.bfloat16])
    assert [part["id"] for part in parts] == ["block-identity", "block-downsample"]
    for part, tensors, convolutions in zip(parts, (8, 11), (2, 3), strict=True):
        assert part["verdict"] == "right", part["reason"]
        assert len(part["rows"]) == 2 * tensors
        fused = ("combine_statistics", "batch_norm_act", "batch_norm_act_sums", "batch_norm_act_gradient")
        assert part["launches"] == {
            "conv_gather_kernel": 4 * convolutions,
            **{f"{kernel}_kernel": 2 * convolutions for kernel in ("conv_wgrad", *fused)},
        }


@pytest.mark.usefixtures("small_photograph", "broken")
def test_the_blocks_find_what_is_broken() -> None:
    assert {part["verdict"] for part in resnet_blocks.run([torch.float32])} == {"wrong"}


@pytest.mark.parametrize("mode", network.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_network_is_compared_tensor_by_tensor(mode: str, dtype: torch.dtype) -> None:
    loaded = models.load("tests.cli.tiny:network", 4, 9)
    part = network.check(network.Workload(loaded, mode, dtype, CPU))
    assert part["verdict"] == "right", part["reason"]
    names = {row["tensor"] for row in part["rows"]}
    parameters = {name for name, _ in loaded.model.named_parameters()}
    assert names == ({"output"} if mode == "infer" else {"loss", *parameters})
    products = [part["launches"].get(f"{kernel}_kernel", 0) for kernel in ("conv_gather", "conv_rows")]
    assert sum(products) == (2 if mode == "infer" else 3)
    assert part["converted"].startswith("2 of 2")


def test_a_network_finds_what_is_broken(broken: str) -> None:
    loaded = models.load("tests.cli.tiny:network", 4, 9)
    part = network.check(network.Workload(loaded, "infer", torch.float32, CPU))
    assert part["verdict"] == "wrong"
    assert ("no kernel" if broken == "not_converted" else "too far off: output") in part["reason"]


def test_one_image_of_one_pixel_infers() -> None:
    part = network.check(network.Workload(models.load("tests.cli.tiny:network", 1, 1), "infer", torch.float32, CPU))
    assert part["verdict"] == "right"


def test_a_network_with_nothing_to_convert_is_no_error(tmp_path, capsys) -> None:
    line = ["bench", "--model", "tests.cli.tiny:perceptron", "--size", "4", "--out", str(tmp_path)]
    assert run(line) == 0
    assert capsys.readouterr().out.count("skipped (nothing to convert") == 2


def test_a_conversion_that_raises_is_a_failed_part(monkeypatch) -> None:
    def raises(model: nn.Module, **options: Any) -> nn.Module:
        raise NotImplementedError("not today")

    monkeypatch.setattr(fastconv, "convert", raises)
    work = network.Workload(models.load("tests.cli.tiny:network", 4, 9), "infer", torch.float32, CPU)
    part = network.check(work)
    assert (part["verdict"], part["reason"]) == ("failed", "NotImplementedError: not today")
