"""The parts that compare numbers: right with our kernels, wrong without them or with wrong ones, on the interpreter."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastconv
import fastconv.functional
from fastconv.activations import activation_of
from fastconv.benchmarks import checks, models
from fastconv.benchmarks.checks import conv, conv_bn_act, pool
from fastconv.benchmarks.checks.check import compare, poisoned_memory
from fastconv.benchmarks.measure import lenet, network, resnet_blocks
from fastconv.cli import run
from fastconv.kernels import epilogue, mend
from fastconv.kernels.dispatch import Plan
from fastconv.kernels.launch import decisions
from fastconv.measuring import accuracy

pytestmark = pytest.mark.skipif(not mend.interpreting(), reason="runs kernels on the CPU: needs TRITON_INTERPRET=1")

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
    # Two convolutions forward; backward skips the gradient of the images.
    assert part["launches"]["conv_rows_kernel"] == part["launches"]["conv_rows_wgrad_kernel"] == 3
    assert part["launches"]["conv_gather_kernel"] == 3 * 2
    assert part["launches"]["conv_wgrad_kernel"] == 3


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


@pytest.fixture
def one_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    first = dataclasses.replace(conv.CONVOLUTION, cases=conv.CONVOLUTION.cases[:1])
    monkeypatch.setattr(checks, "CHECKS", (first,))


def test_operators_and_their_problems_have_names_of_their_own() -> None:
    assert len({operator.name for operator in checks.CHECKS}) == len(checks.CHECKS)
    for operator in checks.CHECKS:
        assert len({case.name for case in operator.cases}) == len(operator.cases)
        assert any(case.quick for case in operator.cases)
        assert sum(case.quick for case in operator.cases) <= len(operator.cases) / 2


def test_every_activation_is_checked() -> None:
    checked = {activation_of(case.act())[0] for case in conv_bn_act.ACTIVATIONS}
    assert checked == set(epilogue.ACTIVATIONS)
    for operator in (conv_bn_act.INFERENCE, conv_bn_act.TRAINING):
        assert all(case in operator.cases for case in conv_bn_act.ACTIVATIONS)


@pytest.mark.parametrize("operator", checks.CHECKS, ids=lambda operator: operator.name)
def test_each_operator_is_right_on_its_first_problem(operator: checks.Check) -> None:
    rows = list(compare(operator, operator.cases[0], "bfloat16", CPU))
    assert all(row["right"] for row in rows)
    gradients = [row["result"] for row in rows if row["result"].endswith("gradient")]
    assert bool(gradients) == (operator.gradients != "none")
    if operator.gradients == "apart":
        assert all(set(row["launches"]) - {"split_sum_kernel"} for row in rows)
        assert len(gradients) == (1 if "pool" in operator.name else 3)


def test_every_pool_is_checked_in_each_rank_and_layout() -> None:
    cases = [case for operator in (pool.MAX_POOL, pool.AVERAGE_POOL, pool.LP_POOL) for case in operator.cases]
    functions = {name for name in fastconv.functional.__all__ if "_pool" in name}
    assert {case.function for case in cases} == functions and len(functions) == 15
    for kind in ("max_pool2d", "avg_pool2d", "adaptive_max_pool2d"):
        assert {"channels_last", "contiguous"} <= {case.layout for case in cases if case.function == kind}


@pytest.mark.parametrize("operator", [conv.DEPTHWISE, conv.GROUPED], ids=lambda operator: operator.name)
def test_what_is_checked_by_name_is_what_runs(operator: checks.Check) -> None:
    for case in operator.cases:
        # Groups as wide as a tile have tiles of their own.
        family = operator.name.partition(" ")[0] if case.weight[1] < 32 else "gather"
        with decisions() as decided:
            operator.ours(case, operator.operands(case, torch.bfloat16, CPU))
        assert [found.family for found in decided if isinstance(found, Plan)] == [family], case.name


def test_a_fused_layer_in_training_is_checked_in_every_result() -> None:
    case = conv_bn_act.FusedCase(name="all", residual="before", act=nn.PReLU, bias=1, weight=(8, 6, 1, 1))
    rows = {row["result"]: row for row in compare(conv_bn_act.TRAINING, case, "float32", CPU)}
    operands = ("input", "weight", "residual", "slope", "BN weight", "BN bias")
    assert list(rows) == ["forward", *conv_bn_act.RUNNING, *(f"{name} gradient" for name in operands)]
    assert "combine_statistics_kernel" in rows["running mean"]["launches"]
    assert "batch_norm_act_sums_kernel" in rows["slope gradient"]["launches"]


@pytest.mark.parametrize("operator", [conv.CONVOLUTION, conv_bn_act.TRAINING], ids=lambda operator: operator.name)
@pytest.mark.parametrize("wrong", ["forward", "a gradient", "unwritten", "dtype"])
def test_what_is_wrong_is_found(operator: checks.Check, wrong: str) -> None:
    def broken(case: Any, operands: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = operator.ours(case, operands)
        z = found["forward"]
        if wrong == "unwritten":
            z = torch.where(torch.arange(z.shape[-1]) == 2, torch.empty_like(z), z)
        if wrong == "a gradient" and z.requires_grad:
            z = z + 1e-2 * (operands["weight"] - operands["weight"].detach()).sum()
        return found | {"forward": z * 1.01 if wrong == "forward" else z.float() if wrong == "dtype" else z}

    precision = "bfloat16" if wrong == "dtype" else "float32"
    rows = list(compare(dataclasses.replace(operator, ours=broken), operator.cases[0], precision, CPU))
    found = {row["result"] for row in rows if not row["right"]}
    assert found == {"weight gradient"} if wrong == "a gradient" else "forward" in found


def test_memory_is_poisoned_inside_alone() -> None:
    with poisoned_memory():
        assert torch.empty(100).isnan().all()
        assert (torch.zeros(3, dtype=torch.uint8).new_empty(3) == 255).all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("one_problem")
def test_check_names_the_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "--quick"]) == 0
    shown = capsys.readouterr().out
    for kernel in ("conv_gather", "conv_wgrad", "channel_sum"):
        assert kernel in shown
    assert " 0 wrong." in shown


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--quick"]], ids=str)
def test_check_is_right(options: list[str]) -> None:
    assert run(["check", *options]) == 0


@pytest.mark.usefixtures("one_problem")
def test_check_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = fastconv.functional.conv2d
    monkeypatch.setattr(fastconv.functional, "conv2d", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    assert run(["check", "--quick"]) == 1
    shown = capsys.readouterr().out
    assert "too far off" in shown and "WRONG" in shown


@pytest.mark.usefixtures("one_problem")
def test_check_finds_a_fallback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fastconv.functional, "conv2d", torch.nn.functional.conv2d)
    assert run(["check", "--quick"]) == 1
    assert "no kernel ran" in capsys.readouterr().out


def test_check_goes_on_after_a_problem_that_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = (conv.case("too few channels", (1, 2, 5, 5), (4, 3, 3, 3), quick=True), conv.CONVOLUTION.cases[0])
    monkeypatch.setattr(checks, "CHECKS", (dataclasses.replace(conv.CONVOLUTION, cases=cases),))
    assert run(["check", "--quick"]) == 1
    shown = capsys.readouterr().out
    assert "RuntimeError" in shown and "15 results compared, 3 wrong." in shown
