"""The parts that compare numbers: right with our kernels, wrong without them or with wrong ones, on the interpreter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastconv
import fastconv.functional
from fastconv.cli import models, run
from fastconv.cli.measure import accuracy, blocks, lenet, network, problems

CPU = torch.device("cpu")
CONVERT = fastconv.convert


def not_converted(model: nn.Module, **options: Any) -> nn.Module:
    return model


def wrongly_converted(model: nn.Module, **options: Any) -> nn.Module:
    """Converted, with the channels of every result in reverse order."""
    model = CONVERT(model, **options)
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            conv.register_forward_hook(lambda module, inputs, output: output.flip(1))
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
    # Two convolutions forward; backward skips the gradient of the images.
    assert part["launches"]["conv_gather_kernel"] == 3 * 3
    assert part["launches"]["conv_wgrad_kernel"] == 3 * 2


def test_lenet_finds_what_is_broken(broken: str) -> None:
    part = lenet.run(3)
    assert part["verdict"] == "wrong"
    assert ("no kernel" if broken == "not_converted" else "losses differ") in part["reason"]


def test_lenet_asks_for_accuracy_only_of_a_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(blocks, "CROP", 64)


@pytest.mark.usefixtures("small_photograph")
def test_both_blocks_are_right_in_every_tensor() -> None:
    parts = blocks.run([torch.float32, torch.bfloat16])
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
    assert {part["verdict"] for part in blocks.run([torch.float32])} == {"wrong"}


@pytest.mark.parametrize("mode", network.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_network_is_compared_tensor_by_tensor(mode: str, dtype: torch.dtype) -> None:
    subject = models.load("tests.cli.tiny:network", 4, 9)
    part = network.check(network.Workload(subject, mode, dtype, CPU))
    assert part["verdict"] == "right", part["reason"]
    names = {row["tensor"] for row in part["rows"]}
    parameters = {name for name, _ in subject.model.named_parameters()}
    assert names == ({"output"} if mode == "infer" else {"loss", *parameters})
    assert part["launches"]["conv_gather_kernel"] == (2 if mode == "infer" else 3)
    assert part["converted"].startswith("2 of 2")


def test_a_network_finds_what_is_broken(broken: str) -> None:
    subject = models.load("tests.cli.tiny:network", 4, 9)
    part = network.check(network.Workload(subject, "infer", torch.float32, CPU))
    assert part["verdict"] == "wrong"
    assert ("no kernel" if broken == "not_converted" else "too far off: output") in part["reason"]


def test_one_image_of_one_pixel_infers() -> None:
    part = network.check(network.Workload(models.load("tests.cli.tiny:network", 1, 1), "infer", torch.float32, CPU))
    assert part["verdict"] == "right"


def test_a_network_with_nothing_to_convert_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["bench", "--model", "tests.cli.tiny:perceptron", "--size", "4", "--out", str(tmp_path)]
    assert run(line) == 0
    assert capsys.readouterr().out.count("skipped (nothing to convert") == 2


def test_a_conversion_that_raises_is_a_failed_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(model: nn.Module, **options: Any) -> nn.Module:
        raise NotImplementedError("not today")

    monkeypatch.setattr(fastconv, "convert", raises)
    work = network.Workload(models.load("tests.cli.tiny:network", 4, 9), "infer", torch.float32, CPU)
    part = network.check(work)
    assert (part["verdict"], part["reason"]) == ("failed", "NotImplementedError: not today")


def test_a_nan_is_never_acceptable() -> None:
    exact, nan = torch.ones(4), torch.tensor([1.0, 1.0, math.nan, 1.0])
    assert math.isnan(accuracy.max_error(nan, exact))
    (row,) = accuracy.against_yardstick({"y": nan}, {"y": exact}, {"y": exact}, torch.float32)
    assert not row["right"]
    (row,) = accuracy.against_yardstick({"y": exact}, {"y": nan}, {"y": exact}, torch.float32)
    assert not row["right"]


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


def test_check_problems_have_names_of_their_own() -> None:
    names = [case.name for case in problems.CASES]
    assert len(set(names)) == len(names)
    assert 5 < len(problems.QUICK) < len(problems.CASES) / 2


def test_check_names_the_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(problems, "QUICK", problems.CASES[:1])
    assert run(["check", "--quick"]) == 0
    shown = capsys.readouterr().out
    for kernel in ("conv_gather_kernel", "conv_wgrad_kernel", "channel_sum_kernel"):
        assert kernel in shown
    assert " 0 wrong." in shown


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--quick"]], ids=str)
def test_check_is_right(options: list[str]) -> None:
    assert run(["check", *options]) == 0


def test_check_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(problems, "QUICK", problems.CASES[:1])
    right = fastconv.functional.conv2d
    monkeypatch.setattr(fastconv.functional, "conv2d", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    assert run(["check", "--quick"]) == 1
    assert "too far off" in capsys.readouterr().out


def test_check_finds_a_fallback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(problems, "QUICK", problems.CASES[:1])
    monkeypatch.setattr(fastconv.functional, "conv2d", torch.nn.functional.conv2d)
    assert run(["check", "--quick"]) == 1
    assert "no kernel ran" in capsys.readouterr().out


def test_check_goes_on_after_a_problem_that_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(problems, "QUICK", (problems.Case("too few channels", (1, 2, 5, 5), (4, 3, 3, 3)),))
    assert run(["check", "--quick"]) == 1
    assert "RuntimeError" in capsys.readouterr().out
