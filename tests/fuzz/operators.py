"""One call of one operator, forward and all gradients, against PyTorch's in fp64.

Values that are integers must come out bit for bit, others within the roundings of their sums.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import torch
import torch.nn.functional as theirs
from torch import Tensor, nn

import fastconv.functional as ours
from convolutions import product_error
from fastconv.autotune import gpus
from fastconv.kernels import dispatch
from fastconv.kernels.launch.interpreter import interpreting
from fastconv.kernels.launch.launch import record
from reference import assert_close, assert_equal
from tests.marks import DEVICE
from views import VIEWS, dense

# Smooth ones, whose derivative a rounding does not change by much; and those that keep integers what they are.
SMOOTH = ("identity", "silu", "tanh", "sigmoid", "gelu", "softplus", "mish")
EXACT: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.25),
    "hardtanh": lambda: nn.Hardtanh(-4.0, 8.0),
    "relu6": nn.ReLU6,
    "prelu": lambda: nn.PReLU(1, 0.25),
}


@dataclass(frozen=True)
class Case:
    """``operands``: by name, the shape and the view of it (tests/views.py); "dy" has only a view."""

    function: str
    operands: dict[str, tuple[tuple[int, ...] | None, str]]
    arguments: dict[str, Any]
    dtype: str = "float32"
    integers: bool = True
    bulk: bool = False  # planned as for a GPU of bulk copies
    precision: str = "ieee"
    act: str | None = None  # of the fused functions
    training: bool = False
    seed: int = 0


def check(case: Case) -> None:
    """Raise AssertionError if a result differs from PyTorch's."""
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision
    setting.fp32_precision = case.precision
    try:
        with dispatch.use_target(gpus.H200) if case.bulk and interpreting() else contextlib.nullcontext():
            _check(case)
    finally:
        setting.fp32_precision = before


def _check(case: Case) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)
    values = {name: _values(name, shape, case, generator) for name, (shape, _) in case.operands.items() if shape}
    operands = {name: _laid_out(t, case.operands[name][1], dtype, name) for name, t in values.items()}
    # What a view repeats is what the reference is made of.
    # Dense, because PyTorch's gradient of a weight may refuse another layout.
    exact = {name: dense(t.detach().cpu().double()) for name, t in operands.items()}
    magnitudes = {name: t.abs() for name, t in exact.items()}
    with record() as records:
        found = _results(ours, case, operands, generator)
    dy = found.pop("dy").detach().cpu().double() if "dy" in found else None
    expected = _results(theirs, case, exact, None, dy)
    assert found.keys() == expected.keys()
    sums = _depth(case)
    linear = case.function.startswith("conv") and case.act is None
    bounds = _results(theirs, case, magnitudes, None, None if dy is None else dy.abs()) if linear else {}
    if "avg" in case.function:
        bounds = _results(theirs, case, magnitudes, None, None if dy is None else dy.abs())
    for name, value in found.items():
        what = f"{name} of {case.function}"
        reference = expected[name].detach()
        if case.integers and (linear or "max" in case.function or case.act is not None):
            assert_equal(value.detach(), reference, what)
        elif name in bounds:
            assert_close(value, reference, bounds[name].detach(), sums, what, product_error(records))
        else:
            _assert_near(value, reference, dtype, sums, what)


def _assert_near(value: Tensor, reference: Tensor, dtype: torch.dtype, depth: int, what: str) -> None:
    """Within roundings of the largest value to ``dtype`` and to fp32, by the root of how many terms are summed."""
    assert value.shape == reference.shape, what
    scale = 1.0 + (float(reference.abs().max()) if reference.numel() else 0.0)
    bound = (8 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps) * sqrt(depth) * scale
    error = (value.detach().cpu().double() - reference).abs()
    # Written so that a NaN fails.
    assert bool((error <= bound).all()), f"{what}: off by {error.max():.2e}, more than {bound:.2e}"


def _values(name: str, shape: tuple[int, ...], case: Case, generator: torch.Generator) -> Tensor:
    if not case.integers and case.function[:2] != "lp":
        spread = torch.randn(shape, generator=generator)
        return spread.abs() + 0.5 if name == "running_var" else spread
    if name == "running_var":
        # With an eps of 1 the roots, of 1 and 4, are exact.
        return torch.tensor([0.0, 3.0])[torch.randint(2, shape, generator=generator)]
    least = 1 if case.function[:2] == "lp" else -3
    return torch.randint(least, 4, shape, generator=generator).float()


def _laid_out(t: Tensor, view: str, dtype: torch.dtype, name: str) -> Tensor:
    # Batch norm's are fp32 whatever the rest is, as under autocast.
    t = VIEWS[view](t.to(torch.float32 if name.startswith(("running", "bn")) else dtype).to(DEVICE)).detach()
    return t if name.startswith("running") else t.requires_grad_()


def _results(
    module: Any, case: Case, operands: dict[str, Tensor], generator: torch.Generator | None, dy: Tensor | None = None
) -> dict[str, Tensor]:
    """The output and every gradient; with ``generator`` the output's gradient is drawn, and returned too."""
    leaves = {name: t.detach().requires_grad_(not name.startswith("running")) for name, t in operands.items()}
    y = _plain_norm(case, leaves) if module is theirs and case.act is not None else _called(module, case, leaves)
    y, *indices = y if isinstance(y, tuple) else (y,)
    found = {"output": y} | ({"indices": indices[0]} if indices else {})
    if generator is not None:
        shape, view = tuple(y.shape), case.operands["dy"][1]
        drawn = torch.randint(-3, 4, shape, generator=generator).to(y.dtype).to(y.device)
        found["dy"] = dy = VIEWS[view](drawn)
    assert dy is not None
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if case.training and "bias" in wanted:
        del wanted["bias"]  # batch norm takes it away again
    gradients = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype))
    found |= {f"gradient of {name}": g for name, g in zip(wanted, gradients, strict=True)}
    return found | {name: leaf for name, leaf in leaves.items() if name.startswith("running") and case.training}


def _called(module: Any, case: Case, leaves: dict[str, Tensor]) -> Any:
    arguments = dict(case.arguments)
    if case.act is not None:
        names = "bias", "bn_weight", "bn_bias", "running_mean", "running_var"
        act = case.act if case.act not in EXACT else EXACT[case.act]().to(DEVICE)
        return getattr(module, case.function)(
            *(leaves["x"], leaves["weight"], *(leaves.get(name) for name in names)),
            **{"training": case.training, "momentum": 0.25, "eps": 1.0, "act": act},
            **{"residual": leaves.get("residual"), **arguments},
        )
    if "weight" in leaves:
        return getattr(module, case.function)(leaves["x"], leaves["weight"], leaves.get("bias"), **arguments)
    return getattr(module, case.function)(leaves["x"], **arguments)


def _plain_norm(case: Case, leaves: dict[str, Tensor]) -> Tensor:
    arguments = dict(case.arguments)
    after = arguments.pop("residual_after", False)
    function = getattr(theirs, case.function.removesuffix("_bn_act"))
    y = function(leaves["x"], leaves["weight"], leaves.get("bias"), **arguments)
    norm = (leaves.get(name) for name in ("running_mean", "running_var", "bn_weight", "bn_bias"))
    z = theirs.batch_norm(y, *norm, case.training, 0.25, 1.0)
    residual = leaves.get("residual")
    if residual is not None and not after:
        z = z + residual
    z = EXACT[case.act]().double()(z) if case.act in EXACT else _smooth(case.act)(z)
    return z + residual if residual is not None and after else z


def _smooth(act: str | None) -> Callable[[Tensor], Tensor]:
    return getattr(theirs, str(act)) if act not in ("tanh", "sigmoid") else getattr(torch, act)


def _depth(case: Case) -> int:
    """The most products that any result sums."""
    x = case.operands["x"][0]
    assert x is not None
    weight = case.operands.get("weight", (None, ""))[0]
    return max(1, prod(x)) * (prod(weight) if weight else 1)
