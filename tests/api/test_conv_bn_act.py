"""functional.conv*_bn_act against PyTorch's convolution, batch norm and activation in fp64, and what it costs.

Inputs and weights are small integers, so that the convolution's result is exact in every dtype: what is compared is
batch norm, activation and gradients, not which side of a ReLU's kink a rounded value fell on.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as theirs
from torch import Tensor, nn

import fastconv.functional as ours
from convolutions import products_of
from fastconv import settings
from fastconv.kernels import dispatch
from fastconv.kernels.families import conv_gather
from fastconv.kernels.families.batch_norm import Activated
from fastconv.kernels.jit.activations import ACTIVATIONS
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.interpreter import interpreting
from fastconv.kernels.launch.launch import LaunchRecord, record
from fastconv.kernels.ops import call
from fastconv.kernels.ops.batch_norm import as_pixels
from fastconv.kernels.problem import conv
from fastconv.reference.conv_bn_act import normalise_and_activate
from reference import integers
from tests.marks import DEVICE
from tests.tiles import take_tile

pytestmark = [pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")]
if not interpreter.interpreting():
    pytestmark.append(pytest.mark.gpu)
EPS, MOMENTUM = 1e-3, 0.3


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...] = (2, 6, 6, 5)
    weight: tuple[int, ...] = (8, 6, 3, 3)
    conv: dict[str, Any] = field(default_factory=lambda: {"padding": 1})
    act: Callable[[], nn.Module] | str | None = "relu"
    residual: str | None = None  # "before" or "after" the activation
    bias: bool = False
    affine: bool = True
    tracked: bool = True  # has running statistics
    channels_last: bool = True
    transposed: bool = False

    @property
    def channels(self) -> int:
        """The output's."""
        return self.weight[1] * self.conv.get("groups", 1) if self.transposed else self.weight[0]


def transposed(name: str, *arguments: Any, **others: Any) -> Case:
    return Case(f"transposed, {name}", *arguments, **others, transposed=True)


CASES = (
    Case("plain"),
    Case("NCHW", channels_last=False),
    Case("bias", bias=True),
    Case("no activation", act=None, bias=True),
    Case("no affine", affine=False),
    Case("no running statistics", tracked=False),
    Case("neither, NCHW, bias", affine=False, tracked=False, channels_last=False, bias=True),
    Case("stride 2", (2, 6, 7, 6), conv={"padding": 1, "stride": 2}),
    Case("2 groups", (2, 8, 5, 4), (12, 4, 3, 3), {"padding": (1, 0), "groups": 2}, "silu"),
    Case("depthwise, relu6", (2, 7, 5, 5), (7, 1, 3, 3), {"padding": 1, "groups": 7}, nn.ReLU6),
    Case("dilated", (1, 5, 9, 8), (7, 5, 3, 2), {"dilation": 2, "stride": (1, 2)}, "hardswish"),
    Case("uneven same", (2, 6, 5, 6), (8, 6, 4, 2), {"padding": "same"}),
    Case("pointwise", (3, 16, 4, 4), (24, 16, 1, 1), {}),
    Case("3 channels", (2, 3, 9, 9), (16, 3, 5, 5), {"stride": 2, "padding": 2}, nn.SiLU),
    Case("residual", residual="before"),
    Case("residual, NCHW", residual="before", channels_last=False),
    Case("residual behind", residual="after", bias=True),
    Case("residual alone", residual="before", act=None),
    Case("residual before a relu6", residual="before", act=nn.ReLU6),
    Case("residual before a smooth one", residual="before", act=nn.GELU),
    Case("1d", (3, 6, 11), (10, 6, 3), {"padding": 1, "stride": 2}, "silu"),
    Case("1d, residual, NCW", (3, 6, 8), (10, 6, 3), {"padding": 1}, residual="before", channels_last=False),
    Case("3d", (1, 4, 3, 4, 5), (8, 4, 3, 3, 3), {"padding": 1}, "relu"),
    Case("3d, residual behind", (1, 4, 3, 4, 3), (8, 2, 1, 3, 1), {"groups": 2}, "tanh", "after"),
    transposed("stride 2", (2, 6, 4, 3), (6, 8, 4, 4), {"stride": 2, "padding": 1}),
    transposed(
        "uneven phases, bias, NCHW", (2, 6, 3, 4), (6, 8, 3, 2), {"stride": (3, 2)}, bias=True, channels_last=False
    ),
    transposed("a phase without taps", (2, 6, 3, 3), (6, 8, 1, 2), {"stride": 2, "output_padding": 1}, "silu"),
    transposed("2 groups, residual", (2, 8, 4, 5), (8, 6, 3, 3), {"padding": 1, "groups": 2}, residual="before"),
    transposed("dilated, residual behind", (1, 5, 4, 4), (5, 7, 3, 2), {"dilation": 2, "stride": 2}, "tanh", "after"),
    transposed("1d", (3, 6, 5), (6, 10, 4), {"stride": 2, "padding": 1, "output_padding": 1}, "silu"),
    transposed("3d", (1, 4, 2, 3, 2), (4, 8, 2, 2, 2), {"stride": 2}),
    *(
        Case(f"act {make()}", act=make)
        for make in (
            nn.Identity,
            nn.ReLU,
            lambda: nn.Hardtanh(-0.3, 0.7),
            lambda: nn.LeakyReLU(0.2),
            nn.PReLU,
            lambda: nn.PReLU(8, init=-0.5),
            lambda: nn.ELU(0.8),
            nn.Hardswish,
            nn.Hardsigmoid,
            nn.Sigmoid,
            nn.Tanh,
            lambda: nn.GELU(approximate="tanh"),
            lambda: nn.Softplus(2.0, 3.0),
            nn.Mish,
        )
    ),
    Case("prelu with a residual before", act=lambda: nn.PReLU(8), residual="before"),
    Case("prelu with a residual behind", act=nn.PReLU, residual="after", affine=False),
)
by_name = {case.name: case for case in CASES}
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])


def conv_of(module: Any, case: Case, suffix: str = "") -> Any:
    return getattr(module, f"conv{'_transpose' * case.transposed}{len(case.shape) - 2}d{suffix}")


@dataclass
class Layer:
    """The operands of one call, leaves of one dtype, vectors and statistics of another."""

    case: Case
    leaves: dict[str, Tensor]
    running: tuple[Tensor, Tensor] | None
    act: Any

    @property
    def wanted(self) -> dict[str, Tensor]:
        slope = {"slope": self.act.weight} if isinstance(self.act, nn.PReLU) else {}
        return {name: t for name, t in {**self.leaves, **slope}.items() if t.requires_grad}


def layer(case: Case, dtype: torch.dtype, norm_dtype: torch.dtype, device: str) -> Layer:
    """The same values for every dtype: what ``dtype`` and ``norm_dtype`` are given is exact in the narrowest."""
    draw = torch.Generator().manual_seed(1)
    x, weight = integers(case.shape, 2, draw), integers(case.weight, 1, draw)
    k = case.channels
    leaves = {"x": x, "weight": weight}
    if case.bias:
        leaves["bias"] = integers((k,), 3, draw)
    output = theirs_conv(case, x, weight, None).shape
    residual = torch.randn(output, generator=draw, dtype=torch.float64).bfloat16().double()
    if case.residual:
        leaves["residual"] = residual
    leaves = {name: t.to(dtype) for name, t in leaves.items()}
    if case.channels_last:
        for name in set(leaves) - {"bias"}:
            leaves[name] = as_pixels(leaves[name])
    gamma, beta = torch.rand(2, k, generator=draw, dtype=torch.float64).float() + 0.5
    if case.affine:
        leaves |= {"gamma": gamma.to(norm_dtype), "beta": (beta - 1).to(norm_dtype)}
    leaves = {name: t.to(device).detach().requires_grad_() for name, t in leaves.items()}
    mean, var = torch.rand(2, k, generator=draw, dtype=torch.float64).float()
    running = ((mean * 4).to(norm_dtype).to(device), (var * 20 + 1).to(norm_dtype).to(device))
    act = case.act() if callable(case.act) else case.act
    if isinstance(act, nn.Module):
        act = act.to(device, norm_dtype)
    return Layer(case, leaves, running, act)


def theirs_conv(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return conv_of(theirs, case)(x, weight, bias, **case.conv)


ACTS = {"relu": theirs.relu, "silu": theirs.silu, "hardswish": theirs.hardswish, "tanh": torch.tanh, None: lambda t: t}


def by_torch(it: Layer, training: bool) -> Tensor:
    case, leaves = it.case, it.leaves
    y = theirs_conv(case, leaves["x"], leaves["weight"], leaves.get("bias"))
    running = it.running if case.tracked or not training else (None, None)
    u = theirs.batch_norm(y, *running, leaves.get("gamma"), leaves.get("beta"), training, MOMENTUM, EPS)
    z = u + leaves["residual"] if case.residual == "before" else u
    z = it.act(z) if callable(it.act) else ACTS[it.act](z)
    return z + leaves["residual"] if case.residual == "after" else z


def by_us(it: Layer, training: bool, **changes: Any) -> Tensor:
    case, leaves = it.case, it.leaves
    running = it.running if case.tracked or not training else (None, None)
    arguments = {
        "training": training,
        "momentum": MOMENTUM,
        "eps": EPS,
        "act": it.act,
        "residual": leaves.get("residual"),
        "residual_after": case.residual == "after",
        **case.conv,
        **changes,
    }
    return conv_of(ours, case, "_bn_act")(
        leaves["x"], leaves["weight"], *(leaves.get(name) for name in ("bias", "gamma", "beta")), *running, **arguments
    )


def gradient_for(z: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(7)
    return torch.randn(z.shape, generator=draw, dtype=torch.float64).bfloat16().to(z.dtype).to(z.device)


def close(value: Tensor, reference: Tensor, dtype: torch.dtype, what: str) -> None:
    """A rounding of the result, some of what is stored in ``dtype`` on the way, more of fp32's sums."""
    assert value.shape == reference.shape, what
    reference = reference.detach().double().cpu()
    store, fp32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    scale = float(reference.abs().max()) if reference.numel() else 0.0
    bound = torch.finfo(value.dtype).eps * reference.abs() + (store + 16 * fp32) * scale + 4 * fp32
    error = (value.detach().double().cpu() - reference).abs()
    # Written so that a NaN fails.
    assert bool((error <= bound).all()), f"{what}: off by {error.max():.2e} where {scale:.2e} is the largest"


def check(
    case: Case, training: bool, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[list[LaunchRecord], list[LaunchRecord]]:
    """Outputs, all gradients and running statistics; returns the launches of forward and of backward."""
    it = layer(case, dtype, torch.float32, DEVICE)
    exact = layer(case, torch.float64, torch.float64, "cpu")
    reference = by_torch(exact, training)
    with settings(strict=True):
        with record() as forward:
            z = by_us(it, training, **changes)
        with record() as backward:
            gradients = torch.autograd.grad(z, list(it.wanted.values()), gradient_for(z))
    assert z.dtype == dtype
    close(z, reference, dtype, "output")
    references = torch.autograd.grad(reference, list(exact.wanted.values()), gradient_for(reference))
    assert it.wanted.keys() == exact.wanted.keys()
    for name, leaf, value, expected in zip(it.wanted, it.wanted.values(), gradients, references, strict=True):
        assert value.dtype == leaf.dtype and value.shape == leaf.shape
        if name == "bias" and training:
            assert not value.any() and expected.abs().max() < 1e-9  # batch norm takes it away again
        else:
            close(value, expected, dtype, f"gradient of {name}")
    for name, value, expected in zip(("mean", "variance"), it.running or (), exact.running or (), strict=True):
        close(value, expected, torch.float32, f"running {name}")
    return forward, backward


@each_mode
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_torch(case: Case, training: bool) -> None:
    forward, backward = check(case, training)
    names = products_of(forward)
    if training:
        assert names == ["conv_gather_kernel", "combine_statistics_kernel", "batch_norm_act_kernel"]
    else:
        assert names[0] == "conv_gather_kernel" and names[1:] in ([], ["batch_norm_act_kernel"])
    names = [name for name in products_of(backward) if name != "split_sum_kernel"]
    sums = ["batch_norm_act_sums_kernel"] * (training or case.affine or case.bias or "prelu" in case.name)
    assert names == [*sums, "batch_norm_act_gradient_kernel", "conv_gather_kernel", "conv_wgrad_kernel"]


@each_mode
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        *("plain", "NCHW", "bias", "2 groups", "depthwise, relu6", "3 channels", "residual", "residual behind"),
        *("transposed, stride 2", "transposed, 2 groups, residual"),
        *("residual before a relu6", "1d", "3d", "act Hardtanh(min_val=-0.3, max_val=0.7)"),
        "prelu with a residual before",
    ],
)
def test_half_precision(name: str, dtype: torch.dtype, training: bool) -> None:
    check(by_name[name], training, dtype)


@pytest.mark.parametrize("batch", [1, 20, 100])
@pytest.mark.parametrize("weight", [(8, 6, 1, 1), (8, 6, 3, 3)], ids=["1x1", "3x3"])
def test_tails_of_the_batch_stay_out_of_the_statistics(batch: int, weight: tuple[int, ...]) -> None:
    # The bias is what every row past the last pixel would hold.
    check(
        Case("", (batch, 6, 3, 3), weight, {}, act="silu", bias=True, residual="before"), weight[-1] == 1 or batch > 1
    )


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_mean_far_from_zero(channels_last: bool, monkeypatch) -> None:
    """Mean 1000, variance 1e-3. A filter that copies keeps the convolution's own roundings out of it."""
    # A tile of a GPU's size: the interpreter adds up a column one by one, and its own tiles are longer.
    take_tile(monkeypatch, {"BLOCK_M": 64, "BLOCK_K": 16, "BLOCK_C": 16, "SPLITS": 1})
    draw = torch.Generator().manual_seed(0)
    x = (1000 + torch.randn(20, 8, 5, 5, generator=draw) * 1e-3**0.5).to(DEVICE)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    weight = torch.eye(8).view(8, 8, 1, 1).to(DEVICE)
    mean, var = torch.zeros(8, device=DEVICE), torch.ones(8, device=DEVICE)
    z = ours.conv2d_bn_act(x, weight, None, None, None, mean, var, training=True, momentum=1.0, eps=1e-5, act=None)
    exact = theirs.batch_norm(x.double().cpu(), None, None, training=True, eps=1e-5)
    # fp32 holds the mean to 3e-5, 0.001 of the deviation. E[x^2] - E[x]^2 would be off by a factor of sixty.
    assert (z.cpu() - exact).abs().max() < 5e-3
    true_var, true_mean = torch.var_mean(x.double().cpu(), (0, 2, 3))
    torch.testing.assert_close(var.cpu().double(), true_var, rtol=2e-3, atol=0)
    torch.testing.assert_close(mean.cpu().double(), true_mean, rtol=2e-7, atol=0)


@each_mode
@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (2, 1, 5, 6), (2, 4, 1, 1), (2, 4, 1, 6)])
@pytest.mark.parametrize("outputs", [1, 6])
@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("w_format", [torch.contiguous_format, torch.channels_last], ids=["w nchw", "w nhwc"])
def test_memory_format_is_pytorchs(shape, outputs, x_format, w_format, training) -> None:
    x = torch.randn(shape).to(DEVICE).contiguous(memory_format=x_format).requires_grad_()
    weight = torch.randn(outputs, shape[1], 1, 1).to(DEVICE).contiguous(memory_format=w_format).requires_grad_()
    statistics = torch.zeros(outputs, device=DEVICE), torch.ones(outputs, device=DEVICE)
    reference = theirs.conv2d(x, weight)
    for inner in (False, True):
        with torch.set_grad_enabled(not inner):
            z = ours.conv2d_bn_act(x, weight, None, None, None, *statistics, training=training, momentum=0.1, eps=EPS)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            assert z.is_contiguous(memory_format=memory_format) == reference.is_contiguous(memory_format=memory_format)


LEAVES = ("x", "weight", "bias", "gamma", "beta", "slope", "residual")


@each_mode
@pytest.mark.parametrize(
    "wanted",
    [
        *((name,) for name in LEAVES),
        *(("x", "weight"), ("weight", "gamma", "beta"), ("x", "residual"), ("gamma", "slope")),
    ],
    ids=" and ".join,
)
@pytest.mark.parametrize("act", ["relu", "prelu"])
@pytest.mark.parametrize("residual", ["before", "after"])
def test_only_needed_gradients_are_computed(residual: str, act: str, wanted: tuple[str, ...], training: bool) -> None:
    if act == "relu" and "slope" in wanted:
        wanted = ("residual",)
    case = Case("", bias=True, residual=residual, act="relu" if act == "relu" else lambda: nn.PReLU(8))
    it, exact = layer(case, torch.float32, torch.float32, DEVICE), layer(case, torch.float64, torch.float64, "cpu")
    for one in (it, exact):
        for name, leaf in one.wanted.items():
            leaf.requires_grad_(name in wanted)
    z, reference = by_us(it, training), by_torch(exact, training)
    with record() as backward:
        gradients = torch.autograd.grad(z, list(it.wanted.values()), gradient_for(z))
    references = torch.autograd.grad(reference, list(exact.wanted.values()), gradient_for(reference))
    for name, value, expected in zip(it.wanted, gradients, references, strict=True):
        close(value, expected, torch.float32, f"gradient of {name}")
    kernels = [(r.name, r.launch.constants.get("DGRAD")) for r in backward if r.name != "split_sum_kernel"]
    inner = set(wanted) & {"x", "weight"}
    statistics_matter = set(wanted) & {"gamma", "beta", "slope"} or (inner if training else "bias" in wanted)
    expected_kernels: list[tuple[str, bool | None]] = []
    if statistics_matter:
        expected_kernels.append(("batch_norm_act_sums_kernel", None))
    if inner or ("residual" in wanted and residual == "before"):
        expected_kernels.append(("batch_norm_act_gradient_kernel", None))
    expected_kernels += [("conv_gather_kernel", True)] * ("x" in wanted)
    expected_kernels += [("conv_wgrad_kernel", None)] * ("weight" in wanted)
    assert kernels == expected_kernels


@contextlib.contextmanager
def saved() -> Iterator[dict[int, int]]:
    """Where each storage lies that is kept for backward -> its bytes."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield storages


class ConvNorm(nn.Module):
    """A convolution and its batch norm, by PyTorch or by us."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor, fused: bool, act: str | None = "relu", residual: Tensor | None = None) -> Tensor:
        conv, bn = self.conv, self.bn
        if not fused:
            z = bn(conv(x))
            if residual is not None:
                z += residual
            return z if act is None else getattr(theirs, act)(z, inplace=True)
        return ours.conv2d_bn_act(
            *(x, conv.weight, None, bn.weight, bn.bias, bn.running_mean, bn.running_var),
            **{"training": bn.training, "momentum": 0.1, "eps": bn.eps, "act": act, "residual": residual},
            stride=conv.stride,
            padding=conv.padding,
        )


class Block(nn.Module):
    """ResNet's: convolutions in a row, the shortcut added before the last activation."""

    def __init__(self, sizes: tuple[int, ...], widths: tuple[int, ...], inputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.ModuleList(
            ConvNorm(a, b, size, stride if index == 0 else 1)
            for index, (a, b, size) in enumerate(zip((inputs, *widths), widths, sizes, strict=False))
        )
        self.shortcut = ConvNorm(inputs, widths[-1], 1, stride) if stride > 1 or inputs != widths[-1] else None

    def forward(self, x: Tensor, fused: bool) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x, fused, None)
        for one in self.body[:-1]:
            x = one(x, fused)
        return self.body[-1](x, fused, residual=shortcut)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "conv, batch norm, relu": lambda: ConvNorm(16, 16, 3),
    "strided": lambda: ConvNorm(16, 32, 3, 2),
    "BasicBlock": lambda: Block((3, 3), (16, 16), 16),
    "BasicBlock with a projection": lambda: Block((3, 3), (32, 32), 16, 2),
    "Bottleneck": lambda: Block((1, 3, 1), (16, 16, 64), 64),
    "Bottleneck with a projection": lambda: Block((1, 3, 1), (16, 16, 64), 16),
}


def kept(model: nn.Module, x: Tensor, fused: bool) -> int:
    """Bytes kept for backward, the model's own parameters and buffers left out."""
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with saved() as storages:
        z = model(x, fused)
    assert z.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in owned)


@each_mode
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("frozen", ["nothing", "affine", "convolutions", "all but the last bias"])
def test_no_more_is_saved_than_by_eager(name: str, frozen: str, training: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().to(DEVICE, memory_format=torch.channels_last).train(training)
    x = torch.randn(2, model.body[0].conv.in_channels if isinstance(model, Block) else 16, 6, 6, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_(frozen != "all but the last bias")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and frozen == "affine":
            module.requires_grad_(False)
        if isinstance(module, nn.Conv2d) and frozen == "convolutions":
            module.requires_grad_(False)
    if frozen == "all but the last bias":
        model.requires_grad_(False)
        list(model.modules())[-1].bias.requires_grad_()
    # With constant statistics their values; eager keeps the buffers.
    values = 0 if training else sum(b.numel() * b.element_size() for b in model.buffers() if b.dim())
    assert kept(model, x, True) <= kept(model, x, False) + values


def test_less_is_saved_with_frozen_weights() -> None:
    x = torch.randn(2, 16, 6, 6, device=DEVICE, requires_grad=True)
    model = ConvNorm(16, 16, 3).to(DEVICE)
    everything = kept(model, x, True)
    model.conv.requires_grad_(False)
    assert kept(model, x, True) <= everything - x.numel() * 4
    model.eval().requires_grad_(False)
    # Its own output, which the next layer keeps too, and the values of its statistics.
    assert kept(model, x, True) <= x.numel() * 4 + 2 * 16 * 4


@each_mode
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_without_grad(mode, training: bool) -> None:
    it = layer(by_name["residual"], torch.float32, torch.float32, DEVICE)
    with mode(), saved() as storages, record() as records:
        z = by_us(it, training)
    assert not storages and z.grad_fn is None
    names = ["conv_gather_kernel", "combine_statistics_kernel", "batch_norm_act_kernel"]
    assert [r.name for r in records] == (names if training else names[:1])


@pytest.mark.parametrize("name", ["plain", "residual behind", "prelu with a residual before", "2 groups", "no affine"])
def test_inference_is_one_launch_and_equals_the_frozen_layer(name: str) -> None:
    it = layer(by_name[name], torch.float32, torch.float32, DEVICE)
    with torch.no_grad(), record() as records:
        z = by_us(it, False)
    assert [r.name for r in records] == ["conv_gather_kernel"]
    exact = layer(by_name[name], torch.float64, torch.float64, "cpu")
    close(z, by_torch(exact, False), torch.float32, "output")


def check_twice(case: Case, training: bool, wanted: tuple[str, ...] | None = None) -> None:
    """The gradients of ``wanted`` (None: all) and theirs, of the result's gradient too, against fp64."""
    it, exact = layer(case, torch.float32, torch.float32, DEVICE), layer(case, torch.float64, torch.float64, "cpu")

    def twice(one: Layer, function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        one.leaves["x"].data /= 4  # so that second gradients are no larger than what they are made of
        for name, leaf in one.wanted.items():
            # In training batch norm takes the bias away again.
            leaf.requires_grad_((not wanted or name in wanted) and not (name == "bias" and training))
        z = function(one, training)
        leaves, dz = list(one.wanted.values()), gradient_for(z).requires_grad_()
        first = torch.autograd.grad(z, leaves, dz, create_graph=True)
        penalty = sum((g * g).mean() for g in first)
        second = torch.autograd.grad(penalty, [*leaves, dz], allow_unused=True)
        return *first, *(torch.zeros_like(t) if s is None else s for s, t in zip(second, [*leaves, dz], strict=True))

    for index, (value, reference) in enumerate(zip(twice(it, by_us), twice(exact, by_torch), strict=True)):
        scale = float(reference.detach().abs().max())
        torch.testing.assert_close(
            value.cpu().double(), reference, rtol=1e-4, atol=2e-5 * scale, msg=lambda text, i=index: f"{i}: {text}"
        )


@each_mode
@pytest.mark.parametrize(
    "name",
    [
        *("plain", "bias", "no affine", "no activation", "depthwise, relu6", "1d", "3d, residual behind"),
        *("residual, NCHW", "residual before a relu6", "residual before a smooth one"),
        *("prelu with a residual before", "transposed, 2 groups, residual"),
    ],
)
def test_a_gradient_of_the_gradient(name: str, training: bool) -> None:
    check_twice(by_name[name], training)


@each_mode
@pytest.mark.parametrize(
    ("act", "wanted"),
    [
        *(("relu", (name,)) for name in ("x", "weight", "gamma", "beta", "residual")),
        *(("silu", (name,)) for name in ("x", "weight", "residual")),
        ("silu", ("bias", "residual")),
        *(("prelu", wanted) for wanted in (("x",), ("slope",), ("x", "gamma", "beta"))),
    ],
    ids=str,
)
def test_a_gradient_of_the_gradient_with_the_rest_frozen(act, wanted, training) -> None:
    """Where neither input, weight nor residual was kept, too."""
    make = (lambda: nn.PReLU(4)) if act == "prelu" else act
    check_twice(Case("", (2, 4, 3, 3), (4, 4, 2, 1), {}, make, "before", bias=True), training, wanted)


@each_mode
def test_one_tensor_as_input_and_residual(training: bool) -> None:
    """Its gradient is the sum of both, once each, in the first and in the second order."""
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 6, 5, 5, generator=draw), torch.randn(6, 6, 3, 3, generator=draw) / 5
    mean, var = torch.zeros(6), torch.ones(6)

    def twice(z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        (first,) = torch.autograd.grad(z, x, gradient_for(z), create_graph=True)
        return first, torch.autograd.grad((first * first).sum(), x)[0]

    mine = [t.to(DEVICE).requires_grad_() for t in (x, weight)]
    statistics = mean.to(DEVICE), var.to(DEVICE)
    z = ours.conv2d_bn_act(
        *(*mine, None, None, None, *statistics),
        **{"training": training, "momentum": 0.1, "eps": EPS, "act": "silu", "residual": mine[0], "padding": 1},
    )
    x, weight = (t.double().requires_grad_() for t in (x, weight))
    u = theirs.batch_norm(
        theirs.conv2d(x, weight, padding=1), mean.double(), var.double(), None, None, training, 0, EPS
    )
    for value, reference in zip(twice(z, mine[0]), twice(theirs.silu(u + x), x), strict=True):
        torch.testing.assert_close(value.cpu().double(), reference, rtol=1e-4, atol=1e-4)


@each_mode
@pytest.mark.parametrize(
    ("act", "residual"),
    list(zip(sorted(set(ACTIVATIONS) - {"hardsigmoid"}), cycle(["before", None, "after"]), strict=False)),
)
def test_the_plain_twin_gradchecks(act: str, residual: str | None, training: bool) -> None:
    """The parts of a gradient of the gradient in fp64, first and second order; PyTorch has no second gradient of
    hardsigmoid."""
    draw = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    k = 2
    y, gamma, beta, slope = leaf(3, k, 2, 1), leaf(k), leaf(k), leaf(k)
    added = leaf(3, k, 2, 1) if residual else None
    mean, var = torch.randn(k, generator=draw).double(), torch.rand(k, generator=draw).double() + 0.5
    a, b = {"hardtanh": (-0.4, 0.9), "leaky_relu": (0.2, 0), "elu": (0.8, 0), "softplus": (2, 3)}.get(act, (0.0, 0.0))
    how = Activated(EPS, act, a, b, residual == "after")

    def twin(y, gamma, beta, slope, added):
        return normalise_and_activate(y, (mean, var, gamma, beta), slope, added, how, training)

    leaves = (y, gamma, beta, slope if act == "prelu" else None, added)
    assert torch.autograd.gradcheck(twin, leaves)
    assert torch.autograd.gradgradcheck(twin, leaves)
    u = theirs.batch_norm(y, mean, var, gamma, beta, training, 0.0, EPS)
    z = u + added if residual == "before" else u
    z = ACTIVATIONS[act].torch(z, slope if act == "prelu" else a, b)
    torch.testing.assert_close(twin(*leaves), z + added if residual == "after" else z)


def call_with(**changes: Any) -> Tensor:
    operands: dict[str, Any] = {
        "x": torch.zeros(2, 4, 5, 5),
        "weight": torch.zeros(6, 4, 3, 3),
        "bias": None,
        "bn_weight": torch.ones(6),
        "bn_bias": torch.zeros(6),
        "running_mean": torch.zeros(6),
        "running_var": torch.ones(6),
    }
    arguments: dict[str, Any] = {"training": True, "momentum": 0.1, "eps": EPS}
    function = changes.pop("function", "conv2d_bn_act")
    for name, value in changes.items():
        (operands if name in operands else arguments)[name] = value
    moved = [v.to(DEVICE) if isinstance(v, Tensor) else v for v in operands.values()]
    if isinstance(arguments.get("residual"), Tensor):
        arguments["residual"] = arguments["residual"].to(DEVICE)
    return getattr(ours, function)(*moved, **arguments)


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "channels": (RuntimeError, r"\[6, 3, 3, 3\]", {"weight": torch.zeros(6, 3, 3, 3)}),
    "rank of x": (ValueError, "expected 4D input", {"x": torch.zeros(4, 5, 5)}),
    "rank of the weight": (RuntimeError, "Expected 4D weight", {"weight": torch.zeros(6, 4, 3)}),
    "a 2d call of the 1d function": (RuntimeError, "conv1d", {"function": "conv1d_bn_act"}),
    "bias": (RuntimeError, r"\[5\]", {"bias": torch.zeros(5)}),
    "groups": (RuntimeError, "groups", {"groups": 3}),
    "running_mean": (RuntimeError, "running_mean should contain 6 elements not 5", {"running_mean": torch.zeros(5)}),
    "running_var": (RuntimeError, "running_var should contain 6 elements not 7", {"running_var": torch.ones(7)}),
    "bn_weight": (RuntimeError, r"bn_weight should contain 6 elements not \[4\]", {"bn_weight": torch.ones(4)}),
    "bn_bias": (RuntimeError, r"bn_bias should contain 6 elements not \[1\]", {"bn_bias": torch.ones(1)}),
    "bn_weight in fp64": (RuntimeError, "mixed dtype.*bn_weight", {"bn_weight": torch.ones(6).double()}),
    "residual's shape": (
        RuntimeError,
        r"residual .*\[2, 6, 1, 1\].*\[2, 6, 3, 3\]",
        {"residual": torch.ones(2, 6, 1, 1)},
    ),
    "residual's dtype": (RuntimeError, "residual .*float16.*float32", {"residual": torch.ones(2, 6, 3, 3).half()}),
    "mixed dtypes": (RuntimeError, "float16", {"weight": torch.zeros(6, 4, 3, 3).half()}),
    "prelu": (RuntimeError, "Found parameter numbers = 4 and channel size = 6", {"act": nn.PReLU(4)}),
    "an activation by name": (ValueError, "'swish' has no fused form; these have: elu, ", {"act": "swish"}),
    "a module": (ValueError, r"CELU\(.*\) has no fused form", {"act": nn.CELU()}),
    "a function": (ValueError, "has no fused form", {"act": torch.sin}),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@each_mode
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, training: bool, grad: bool) -> None:
    error, match, changes = BAD[name]
    if grad and "x" not in changes:
        changes = {**changes, "x": torch.zeros(2, 4, 5, 5, requires_grad=True)}
    with pytest.raises(error, match=match):
        call_with(**changes, training=training)


@pytest.mark.parametrize("x", [torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 3, 3, requires_grad=True)])
def test_one_value_per_channel(x: Tensor) -> None:
    with pytest.raises(ValueError) as expected:
        theirs.batch_norm(torch.zeros(1, 6, 1, 1), None, None, training=True)
    with pytest.raises(ValueError) as raised:
        call_with(x=x)
    assert str(raised.value) == str(expected.value)
    assert call_with(x=x, training=False).shape == (1, 6, 1, 1)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_evaluation_needs_statistics(name: str) -> None:
    with pytest.raises(RuntimeError, match="running_mean and running_var to be defined"):
        call_with(**{name: None}, training=False)


@each_mode
def test_empty_batch(training: bool) -> None:
    """As torch's: an empty result, gradients of zero, running statistics as they were."""
    it = layer(Case("", residual="before", bias=True), torch.float32, torch.float32, DEVICE)
    it.leaves |= {name: it.leaves[name].detach()[:0].requires_grad_() for name in ("x", "residual")}
    before = [t.clone() for t in it.running or ()]
    z = by_us(it, training)
    assert z.shape == (0, 8, 6, 5)
    for (name, leaf), gradient in zip(
        it.wanted.items(), torch.autograd.grad(z.sum(), list(it.wanted.values())), strict=True
    ):
        assert gradient.shape == leaf.shape and not gradient.any(), name
    assert all(torch.equal(a, b) for a, b in zip(before, it.running or (), strict=True))
    with torch.no_grad():
        assert by_us(it, training).shape == z.shape


@each_mode
def test_autocast_with_fp32_batch_norm(training: bool) -> None:
    """Parameters stay fp32, the convolution and its result are bf16; gradients come back in fp32."""
    case = Case("", bias=True, residual="before")
    it, exact = layer(case, torch.float32, torch.float32, DEVICE), layer(case, torch.float64, torch.float64, "cpu")
    with torch.autocast(DEVICE, torch.bfloat16), record() as records:
        z = by_us(it, training)
    assert z.dtype == torch.bfloat16 and records[0].dtypes[0] == torch.bfloat16
    assert all(r.dtypes[0] in (torch.bfloat16, torch.float32) for r in records)
    reference = by_torch(exact, training)
    close(z, reference, torch.bfloat16, "output")
    gradients = torch.autograd.grad(z, list(it.wanted.values()), gradient_for(z))
    references = torch.autograd.grad(reference, list(exact.wanted.values()), gradient_for(reference))
    for name, value, expected in zip(it.wanted, gradients, references, strict=True):
        assert value.dtype == torch.float32
        if name != "bias" or not training:
            close(value, expected, torch.bfloat16, f"gradient of {name}")
    for value, expected in zip(it.running or (), exact.running or (), strict=True):
        close(value, expected, torch.float32, "running statistics")


@each_mode
@pytest.mark.parametrize("name", ["plain", "residual behind", "prelu with a residual before", "1d"])
def test_what_no_kernel_serves_is_pytorchs(name: str, training: bool) -> None:
    """fp64, anywhere: the same numbers from PyTorch's own operators, and no launch, though strict."""
    it, exact = (layer(by_name[name], torch.float64, torch.float64, "cpu") for _ in range(2))
    with settings(strict=True), record() as records:
        z = by_us(it, training)
    assert not records
    torch.testing.assert_close(z, by_torch(exact, training))
    for value, expected in zip(it.running or (), exact.running or (), strict=True):
        torch.testing.assert_close(value, expected)


@each_mode
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_a_convolution_without_a_kernel(grad: bool, training: bool, monkeypatch, caplog) -> None:
    monkeypatch.setattr(call, "_calls", {})
    refusing = replace(conv_gather.FAMILY, why_not=lambda *a: "not today")
    monkeypatch.setattr(dispatch, "FAMILIES", dict.fromkeys(conv.DIRECTIONS, (refusing,)))
    for name in ("residual", "NCHW", "prelu with a residual before", "1d"):
        it = layer(by_name[name], torch.float32, torch.float32, DEVICE)
        exact = layer(by_name[name], torch.float64, torch.float64, "cpu")
        with torch.set_grad_enabled(grad), caplog.at_level("INFO", logger="fastconv"):
            z, reference = by_us(it, training), by_torch(exact, training)
        close(z, reference, torch.float32, "output")
        if grad:
            values = torch.autograd.grad(z, list(it.wanted.values()), gradient_for(z))
            references = torch.autograd.grad(reference, list(exact.wanted.values()), gradient_for(reference))
            for key, value, expected in zip(it.wanted, values, references, strict=True):
                close(value, expected, torch.float32, f"gradient of {key}")
        with torch.set_grad_enabled(grad), settings(strict=True), pytest.raises(RuntimeError, match="not today"):
            by_us(it, training)


@each_mode
@pytest.mark.parametrize(
    "case",
    [
        *(by_name[name] for name in ("plain", "NCHW", "residual", "prelu with a residual before")),
        Case("residual behind a silu", act="silu", residual="after"),
        by_name["transposed, 2 groups, residual"],
    ],
    ids=lambda case: case.name,
)
def test_torch_compile(case: Case, training: bool) -> None:
    torch._dynamo.reset()
    it, again = (layer(case, torch.float32, torch.float32, DEVICE) for _ in range(2))

    def step(x, weight, gamma, beta, mean, var, residual):
        z = conv_of(ours, case, "_bn_act")(
            *(x, weight, None, gamma, beta, mean, var),
            **{"training": training, "momentum": MOMENTUM, "eps": EPS, "act": it.act, "residual": residual},
            residual_after=case.residual == "after",
            **case.conv,
        )
        return z * 2

    def run(function: Any, one: Layer) -> tuple[list[Tensor], list[str]]:
        names = "x", "weight", "gamma", "beta"
        with record() as records:
            z = function(*(one.leaves[n] for n in names), *(one.running or ()), one.leaves.get("residual"))
            gradients = torch.autograd.grad(z, list(one.leaves.values()), gradient_for(z))
        return [z, *gradients, *(one.running or ())], [r.name for r in records]

    values, launched = run(torch.compile(step, fullgraph=True, backend="aot_eager"), it)
    expected, eager = run(step, again)
    assert launched == eager
    for value, reference in zip(values, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-6, atol=1e-6)
    with torch.no_grad(), record() as records:
        torch.compile(step, fullgraph=True, backend="aot_eager")(
            *(it.leaves[n] for n in ("x", "weight", "gamma", "beta")), *(it.running or ()), it.leaves.get("residual")
        )
    assert len(records) == (3 if training else 1)


@each_mode
def test_torch_compile_takes_any_batch(training: bool) -> None:
    """One compilation for two batch sizes, forward and backward: no size becomes a guard."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    it = layer(by_name["plain"], torch.float32, torch.float32, DEVICE)
    compiled = torch.compile(lambda x: by_us(replace(it, leaves={**it.leaves, "x": x}), training), backend=counter)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 6, 6, 5, device=DEVICE)
        torch._dynamo.mark_dynamic(x, 0)
        gradients = []
        for function in (compiled, compiled.__wrapped__):
            leaf = x.detach().requires_grad_()
            torch._dynamo.mark_dynamic(leaf, 0)
            gradients.append(torch.autograd.grad(function(leaf).square().sum(), (leaf, it.leaves["weight"])))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def operator_arguments(name: str, residual: bool) -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw).to(DEVICE) + 0.5

    x, weight, y = tensor(2, 6, 5, 5), tensor(4, 3, 3, 3), tensor(2, 4, 3, 5)
    vectors = [tensor(4) for _ in range(5)]
    convolution = [2, 1], [1, 0, 1, 0], [1, 1], 2
    how = (1e-5, "leaky_relu" if residual else "relu", 0.1, 0.0, False)
    slope, added = (vectors[4], tensor(2, 4, 3, 3)) if residual else (None, None)
    z = None if residual else tensor(2, 4, 3, 3)
    y = tensor(2, 4, 3, 3).contiguous(memory_format=torch.channels_last if residual else torch.contiguous_format)
    dz = tensor(2, 4, 3, 3)
    norm = vectors[:4] if residual else (*vectors[:2], None, None)
    z_like, wide_norm, leading = tensor(2, 4, 3, 6), [tensor(6) for _ in range(4)], ([2, 1], [1, 1], [1, 1], 2)
    return {
        "conv_act": (x, weight, None, *norm, slope, added, None, *convolution, *how),
        "conv_act transposed": (z_like, weight, None, *wide_norm, None, None, [5, 6], *leading, *how),
        "conv_statistics": (x, weight, vectors[0] if residual else None, None, *convolution),
        "conv_statistics transposed": (
            z_like,
            weight,
            vectors[0][:1].expand(6) if residual else None,
            [5, 6],
            *leading,
        ),
        "batch_norm_act": (y, *norm, slope, added, *how, residual),
        "batch_norm_act_sums": (dz, y, z, *norm, slope, added, *how),
        "batch_norm_act_gradient": (
            *(dz, y if residual else None, z, *norm, slope, added),
            *(tensor(3, 4) if residual else None, 18, *how, residual),
        ),
    }[name]


@pytest.mark.parametrize("residual", [True, False], ids=["with everything", "with little"])
@pytest.mark.parametrize(
    "name",
    [
        *("conv_act", "conv_act transposed", "conv_statistics", "conv_statistics transposed"),
        *("batch_norm_act", "batch_norm_act_sums", "batch_norm_act_gradient"),
    ],
)
def test_opcheck(name: str, residual: bool) -> None:
    """PyTorch's own check of an operator: schema, fakes of the right strides, tracing with symbolic sizes."""
    torch.library.opcheck(getattr(torch.ops.fastconv, name.split()[0]).default, operator_arguments(name, residual))


# Each of two processes runs it on its share of the batch. Arguments: rank, meeting place, folder of all tensors.
PROCESS = """
import os
import sys
import torch
import torch.distributed as dist
import fastconv.functional as ours
from fastconv.functional.conv_bn_act import conv_norm_act

rank, meeting, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
for index, (start, stop) in enumerate(zip((0, 0, 0), (3, 5, 0))):
    o = torch.load(f"{folder}/operands.pt")
    share = slice(0, stop) if rank == 0 else slice(stop, None)
    leaves = [o["x"][share], o["weight"], o["gamma"], o["beta"], o["residual"][share]]
    x, weight, gamma, beta, residual = leaves = [t.clone().requires_grad_() for t in leaves]
    norm = o["mean"], o["var"], gamma, beta
    z = conv_norm_act(
        *(ours.conv2d, x, weight, None, norm, True, 0.3, 1e-3, "silu", residual, False, 1, 1, 1, 1),
        group=dist.group.WORLD,
    )
    gradients = torch.autograd.grad(z, leaves, o["dz"][share], retain_graph=True)
    again = torch.autograd.grad(z, leaves, o["dz"][share], create_graph=True)
    assert all(map(torch.equal, gradients, again))
    try:
        torch.autograd.grad(again[0].sum(), leaves)
        error = ""
    except RuntimeError as raised:
        error = str(raised)
    torch.save((z.detach(), *gradients, o["mean"], o["var"], error), f"{folder}/{index}-{rank}.pt")
# Both are done: leave without gloo's teardown, whose threads can end a process that is already exiting.
dist.barrier()
os._exit(0)
"""


@pytest.mark.skipif(not interpreting(), reason="its processes meet over gloo and interpret the kernels")
def test_statistics_over_a_process_group(tmp_path) -> None:
    """Two processes with uneven shares of a batch, once with nothing at all, against one process with all of it."""
    draw = torch.Generator().manual_seed(0)
    operands = {
        "x": torch.randn(7, 6, 4, 3, generator=draw).contiguous(memory_format=torch.channels_last),
        "weight": torch.randn(8, 6, 3, 3, generator=draw),
        "gamma": torch.rand(8, generator=draw) + 0.5,
        "beta": torch.randn(8, generator=draw),
        "residual": torch.randn(7, 8, 4, 3, generator=draw),
        "dz": torch.randn(7, 8, 4, 3, generator=draw),
        "mean": torch.randn(8, generator=draw),
        "var": torch.rand(8, generator=draw),
    }
    torch.save(operands, tmp_path / "operands.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path / "meeting"), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    exact = {name: t.double() for name, t in operands.items()}
    leaves = [exact[name].requires_grad_() for name in ("x", "weight", "gamma", "beta", "residual")]
    x, weight, gamma, beta, residual = leaves
    mean, var = exact["mean"].detach(), exact["var"].detach()
    u = theirs.batch_norm(theirs.conv2d(x, weight, padding=1), mean, var, gamma, beta, True, 0.3, 1e-3)
    z = theirs.silu(u + residual)
    expected = z, *torch.autograd.grad(z, leaves, exact["dz"]), mean, var
    names = ("z", "x", "weight", "gamma", "beta", "residual", "mean", "var")
    for index in range(3):
        *first, first_error = torch.load(tmp_path / f"{index}-0.pt")
        *second, second_error = torch.load(tmp_path / f"{index}-1.pt")
        for name, a, b, reference in zip(names, first, second, expected, strict=True):
            if name in ("z", "x", "residual"):
                close(torch.cat([a, b]), reference, torch.float32, name)
            elif name in ("mean", "var"):
                assert torch.equal(a, b)
                close(a, reference, torch.float32, f"running {name}")
            else:
                # Each process has the gradient of its own share; their sum is what DDP averages.
                close(a + b, reference, torch.float32, f"gradient of {name}")
        assert "process group is differentiable once" in first_error and first_error == second_error
