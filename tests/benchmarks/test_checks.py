"""What ``fastconv check`` compares: right with our kernels, wrong without them or with wrong ones, interpreted."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import fastconv
import fastconv.functional
from fastconv.activations import activation_of
from fastconv.benchmarks import checks
from fastconv.benchmarks.checks import conv, conv_bn_act, pool
from fastconv.benchmarks.checks.check import compare, poisoned_memory
from fastconv.cli import run
from fastconv.kernels.dispatch import Plan
from fastconv.kernels.jit import activations
from fastconv.kernels.launch.launch import decisions
from tests.marks import interpreted

pytestmark = interpreted
CPU = torch.device("cpu")


@pytest.fixture
def one_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    first = dataclasses.replace(conv.CONVOLUTION, cases=conv.CONVOLUTION.cases[:1])
    monkeypatch.setattr(checks, "CHECKS", (first,))


def test_checks_and_their_cases_have_names_of_their_own() -> None:
    assert len({check.name for check in checks.CHECKS}) == len(checks.CHECKS)
    for check in checks.CHECKS:
        assert len({case.name for case in check.cases}) == len(check.cases)
        assert any(case.quick for case in check.cases)
        assert sum(case.quick for case in check.cases) <= len(check.cases) / 2


def test_every_activation_is_checked() -> None:
    checked = {activation_of(case.act())[0] for case in conv_bn_act.ACTIVATIONS}
    assert checked == set(activations.ACTIVATIONS)
    for check in (conv_bn_act.INFERENCE, conv_bn_act.TRAINING):
        assert all(case in check.cases for case in conv_bn_act.ACTIVATIONS)


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.name)
def test_each_operator_is_right_on_its_first_problem(check: checks.Check) -> None:
    rows = list(compare(check, check.cases[0], "bfloat16", CPU))
    assert all(row["right"] for row in rows)
    gradients = [row["result"] for row in rows if row["result"].endswith("gradient")]
    assert bool(gradients) == (check.gradients != "none")
    if check.gradients == "apart":
        assert all(set(row["launches"]) - {"split_sum_kernel"} for row in rows)
        assert len(gradients) == (1 if "pool" in check.name else 3)


def test_every_pool_is_checked_in_each_rank_and_layout() -> None:
    cases = [case for check in (pool.MAX_POOL, pool.AVERAGE_POOL, pool.LP_POOL) for case in check.cases]
    functions = {name for name in fastconv.functional.__all__ if "_pool" in name}
    assert {case.function for case in cases} == functions and len(functions) == 15
    for kind in ("max_pool2d", "avg_pool2d", "adaptive_max_pool2d"):
        assert {"channels_last", "contiguous"} <= {case.layout for case in cases if case.function == kind}


@pytest.mark.parametrize("check", [conv.DEPTHWISE, conv.GROUPED], ids=lambda check: check.name)
def test_what_is_checked_by_name_is_what_runs(check: checks.Check) -> None:
    for case in check.cases:
        # Groups as wide as a tile have tiles of their own.
        family = check.name.partition(" ")[0] if case.weight[1] < 32 else "gather"
        with decisions() as decided:
            check.ours(case, check.operands(case, torch.bfloat16, CPU))
        assert [found.family for found in decided if isinstance(found, Plan)] == [family], case.name


def test_a_fused_layer_in_training_is_checked_in_every_result() -> None:
    case = conv_bn_act.FusedCase(name="all", residual="before", act=nn.PReLU, bias=1, weight=(8, 6, 1, 1))
    rows = {row["result"]: row for row in compare(conv_bn_act.TRAINING, case, "float32", CPU)}
    operands = ("input", "weight", "residual", "slope", "BN weight", "BN bias")
    assert list(rows) == ["forward", *conv_bn_act.RUNNING, *(f"{name} gradient" for name in operands)]
    assert "combine_statistics_kernel" in rows["running mean"]["launches"]
    assert "batch_norm_act_sums_kernel" in rows["slope gradient"]["launches"]


@pytest.mark.parametrize("check", [conv.CONVOLUTION, conv_bn_act.TRAINING], ids=lambda check: check.name)
@pytest.mark.parametrize("wrong", ["forward", "a gradient", "unwritten", "dtype"])
def test_what_is_wrong_is_found(check: checks.Check, wrong: str) -> None:
    def broken(case: Any, operands: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = check.ours(case, operands)
        z = found["forward"]
        if wrong == "unwritten":
            z = torch.where(torch.arange(z.shape[-1]) == 2, torch.empty_like(z), z)
        if wrong == "a gradient" and z.requires_grad:
            z = z + 1e-2 * (operands["weight"] - operands["weight"].detach()).sum()
        return found | {"forward": z * 1.01 if wrong == "forward" else z.float() if wrong == "dtype" else z}

    precision = "bfloat16" if wrong == "dtype" else "float32"
    rows = list(compare(dataclasses.replace(check, ours=broken), check.cases[0], precision, CPU))
    found = {row["result"] for row in rows if not row["right"]}
    assert found == {"weight gradient"} if wrong == "a gradient" else "forward" in found


def test_memory_is_poisoned_only_inside() -> None:
    with poisoned_memory():
        assert torch.empty(100).isnan().all()
        assert (torch.zeros(3, dtype=torch.uint8).new_empty(3) == 255).all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("one_problem")
def test_check_names_the_kernels(capsys) -> None:
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
def test_check_finds_a_wrong_kernel(monkeypatch, capsys) -> None:
    right = fastconv.functional.conv2d
    monkeypatch.setattr(fastconv.functional, "conv2d", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    assert run(["check", "--quick"]) == 1
    shown = capsys.readouterr().out
    assert "too far off" in shown and "WRONG" in shown


@pytest.mark.usefixtures("one_problem")
def test_check_finds_a_fallback(monkeypatch, capsys) -> None:
    monkeypatch.setattr(fastconv.functional, "conv2d", torch.nn.functional.conv2d)
    assert run(["check", "--quick"]) == 1
    assert "no kernel ran" in capsys.readouterr().out


def test_check_goes_on_after_a_problem_that_raises(monkeypatch, capsys) -> None:
    cases = (conv.case("too few channels", (1, 2, 5, 5), (4, 3, 3, 3), quick=True), conv.CONVOLUTION.cases[0])
    monkeypatch.setattr(checks, "CHECKS", (dataclasses.replace(conv.CONVOLUTION, cases=cases),))
    assert run(["check", "--quick"]) == 1
    shown = capsys.readouterr().out
    assert "RuntimeError" in shown and "15 results compared, 3 wrong." in shown
