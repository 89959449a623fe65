"""Convolution problems with their references, and the checks that tests of kernel families share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fastconv.kernels.launch.descriptor import MAPS_ROUND
from fastconv.kernels.launch.interpreter import interpreting
from fastconv.kernels.launch.launch import Launch, LaunchRecord, record
from fastconv.kernels.ops import call, conv
from fastconv.kernels.problem.conv import DIRECTIONS, ConvProblem, conv_problem
from fastconv.kernels.problem.layout import strides_like
from fastconv.reference.conv import both_sides, pad_argument
from reference import assert_close, assert_equal, exact_limit, integers
from tests.marks import DEVICE

# The results that `expected` gives, and `computed` on demand.
RESULTS = (*DIRECTIONS, "bias gradient")


@dataclass(frozen=True)
class Case:
    name: str
    n: int
    c: int
    k: int
    size: tuple[int, ...]
    filter: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    after: tuple[int, ...] | None = None  # trailing padding; None: as the leading one

    def problem(self, dtype: torch.dtype = torch.float32) -> ConvProblem:
        rank = len(self.size)
        before = self.padding or (0,) * rank
        return conv_problem(
            (self.n, self.c, *self.size),
            (self.k, self.c // self.groups, *self.filter),
            (self.k,),
            self.stride or (1,) * rank,
            (*before, *(before if self.after is None else self.after)),
            self.dilation or (1,) * rank,
            self.groups,
            dtype,
        )


def trailing(problem: ConvProblem) -> tuple[int, ...]:
    """The trailing padding, negative where pixels are left over, that gives exactly the problem's output."""
    sizes = problem.input_size, problem.output_size, problem.filter_size
    return both_sides(sizes, problem.stride, problem.padding, problem.dilation)[problem.rank :]


def expected(problem: ConvProblem, x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """fprop, dgrad, wgrad and the bias's gradient by PyTorch, in the operands' dtype (fp64)."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    sides = pad_argument(problem.padding + trailing(problem))
    function = (torch.conv1d, torch.conv2d, torch.conv3d)[problem.rank - 1]
    padded = torch.nn.functional.pad(x, sides)
    y = function(padded, weight, None, problem.stride, 0, problem.dilation, problem.groups)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    return y.detach(), dx, dw, dy.transpose(0, 1).flatten(1).sum(1)


def computed(
    problem: ConvProblem,
    x: torch.Tensor,
    dy: torch.Tensor,
    weight: torch.Tensor,
    channels_last: bool = True,
    results: Sequence[str] = RESULTS,
) -> tuple[torch.Tensor, ...]:
    """The ``results`` by our kernels, from tensors in either memory format."""

    def operand(t: torch.Tensor) -> torch.Tensor:
        t = t.to(problem.dtype).to(DEVICE)
        return t.new_empty_strided(t.shape, strides_like(t.shape, channels_last)).copy_(t)

    x, dy, weight = map(operand, (x, dy, weight))
    stride, padding, *rest = arguments = problem.stride, problem.padding, problem.dilation, problem.groups
    each = {
        "fprop": lambda: conv.conv_fprop(x, weight, None, stride, padding + trailing(problem), *rest),
        "dgrad": lambda: conv.conv_dgrad(dy, weight, None, problem.input_size, *arguments, channels_last),
        "wgrad": lambda: conv.conv_wgrad(x, dy, problem.filter_size, *arguments, channels_last),
        "bias gradient": lambda: conv.channel_sum(dy),
    }
    return tuple(each[name]() for name in results)


def depths(problem: ConvProblem) -> tuple[int, int, int, int]:
    """Products summed for one element of fprop, dgrad, wgrad and the bias's gradient."""
    c, k = problem.in_channels // problem.groups, problem.out_channels // problem.groups
    return c * problem.taps, k * problem.taps, problem.output_pixels, problem.output_pixels


_FAMILIES = ("conv_rows", "conv_row_boxes", "conv_depthwise", "conv_pixels", "conv_gemm", "conv_spatial")


def products_of(records: Iterable[LaunchRecord]) -> list[str]:
    """The kernels launched, without those that lay out a weight; a convolution's has the gather's name, whichever
    family served it."""
    names = [record.name for record in records if record.name != "conv_rows_weight_kernel"]
    for family in _FAMILIES:
        names = [name.replace(f"{family}_wgrad", "conv_wgrad").replace(family, "conv_gather") for name in names]
    return names


def exact_operands(problem: ConvProblem, results: Sequence[str] = RESULTS) -> list[torch.Tensor]:
    """x, dy and weight in fp64: integers whose sums for the ``results`` are exact."""
    each = dict(zip(RESULTS, depths(problem), strict=True))
    limit, generator = exact_limit(problem.dtype, max(each[name] for name in results)), torch.Generator().manual_seed(0)
    return [integers(shape, limit, generator) for shape in _shapes(problem)]


def random_operands(problem: ConvProblem) -> list[torch.Tensor]:
    """x, dy and weight in fp64: values of the problem's dtype."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(problem.dtype).double() for shape in _shapes(problem)]


def _shapes(problem: ConvProblem) -> tuple[tuple[int, ...], ...]:
    return problem.input_shape, problem.output_shape, problem.weight_shape


def check_exact(
    problem: ConvProblem, channels_last: bool = True, results: Sequence[str] = RESULTS
) -> list[LaunchRecord]:
    """The ``results`` on integers, bit for bit; the launches that they took."""
    operands = exact_operands(problem, results)
    with record() as records:
        values = computed(problem, *operands, channels_last, results)
    references = dict(zip(RESULTS, expected(problem, *operands), strict=True))
    for name, value in zip(results, values, strict=True):
        assert_equal(value, references[name], f"{name} of {problem.describe()}")
    return records


def check_infinities(
    problem: ConvProblem, operands: Sequence[torch.Tensor], results: Sequence[str] = RESULTS
) -> list[LaunchRecord]:
    """The ``results`` of integers among which are infinities or NaN, which reach only what meets them; the launches."""
    with record() as records:
        values = computed(problem, *operands, results=results)
    references = dict(zip(RESULTS, expected(problem, *operands), strict=True))
    for name, value in zip(results, values, strict=True):
        value, reference = value.double().cpu(), references[name].to(problem.dtype).double()
        assert torch.equal(value.isnan(), reference.isnan()), name
        assert torch.equal(value.nan_to_num(0, 1e9, -1e9), reference.nan_to_num(0, 1e9, -1e9)), name
    return records


def check_wide_offsets(
    monkeypatch, problem: ConvProblem, modules: Iterable[Any], results: Sequence[str] = RESULTS
) -> None:
    """64-bit offsets, asked for in the families' ``modules``, give the same."""
    for module in modules:
        monkeypatch.setattr(module, "needs_int64", lambda *operands: True)
    monkeypatch.setattr(call, "_calls", {})
    records = check_exact(problem, results=results)
    products = [it.launch.constants for it in records if "WIDE" in it.launch.constants]
    assert products and all(constants["WIDE"] for constants in products)


def rounds_to_tf32(launch: Launch) -> bool:
    """Whether both factors of a TF32 product are the nearest to what they are of."""
    if any(it.factor for _, it in launch.described):
        return MAPS_ROUND
    return launch.constants["ROUND"]


def product_error(records: Iterable[LaunchRecord]) -> float:
    """The relative error of one product of the kernels launched, before it is added."""
    launches = [it.launch for it in records if it.launch.constants.get("PRECISION") == "tf32"]
    if interpreting() or not launches:
        return 0.0
    # TF32 keeps 10 bits of fraction: a factor is off by 2^-11 of itself if rounded, by less than 2^-10 if truncated.
    factor = 2.0**-11 if all(map(rounds_to_tf32, launches)) else 2.0**-10
    return 2 * factor + factor**2


def check_random(problem: ConvProblem, results: Sequence[str] = RESULTS) -> None:
    """The ``results`` on random values, within the roundings of their sums; compiled, fp32 in each precision."""
    operands = random_operands(problem)
    magnitudes = expected(problem, *(operand.abs() for operand in operands))
    each = dict(zip(RESULTS, zip(expected(problem, *operands), magnitudes, depths(problem), strict=True), strict=True))
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision
    both = problem.dtype is torch.float32 and not interpreting()
    try:
        for precision in ("ieee", "tf32") if both else (before,):
            setting.fp32_precision = precision
            for name in results:
                with record() as records:
                    (value,) = computed(problem, *operands, results=(name,))
                what = f"{name} of {problem.describe()}, {precision}"
                assert_close(value, *each[name], what, product_error(records))
    finally:
        setting.fp32_precision = before


@cache
def of_networks(networks: tuple[str, ...], batches: tuple[int, ...]) -> tuple[tuple[ConvProblem, bool], ...]:
    """(problem in bf16, whether it has a bias) of each distinct convolution of the named lists; a transposed one is
    the problem whose dgrad it is, without a bias."""
    # Imported here because reading lists needs the command line's packages.
    from fastconv.benchmarks.layer_lists import find

    calls = [call for network in networks for call in find(network).calls if not call.pool]
    biased = [(call, call.shapes[2] is not None and not call.transposed) for call in calls]
    each = ((call.with_batch(n).problem(torch.bfloat16), bias) for n in batches for call, bias in biased)
    return tuple(dict.fromkeys(each))
