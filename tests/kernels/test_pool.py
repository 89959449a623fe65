"""Pooling kernels in both directions: maxima and indices as PyTorch's CPU operators have them, sums against fp64.

Every input has ties, two NaN and a region of -inf; outputs are poisoned, so an element that no program wrote fails.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastconv.autotune import gpus
from fastconv.kernels import dispatch
from fastconv.kernels.families import pool_gradient, pool_window
from fastconv.kernels.launch.launch import record
from fastconv.kernels.ops import call, pool
from fastconv.kernels.problem.layout import is_channels_last, strides_like
from fastconv.kernels.problem.pool import PoolProblem, index_type, largest_share
from reference import assert_close, assert_equal
from tests.marks import DEVICE, runs_kernels
from tests.tiles import take_tile

pytestmark = runs_kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Ints = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    name: str
    n: int
    c: int
    size: Ints
    window: Ints
    stride: Ints
    padding: Ints = ()
    dilation: Ints = ()
    ceil: bool = False

    @property
    def rank(self) -> int:
        return len(self.size)

    @property
    def geometry(self) -> pool.Geometry:
        rank = self.rank
        return self.window, self.stride, self.padding or (0,) * rank, self.dilation or (1,) * rank

    @property
    def index(self) -> torch.dtype:
        return pool.tap_type(self.size, (), self.window)


CASES = (
    Case("1d", 2, 8, (11,), (3,), (2,), (1,)),
    Case("1d, stride 1", 1, 5, (9,), (3,), (1,), (1,)),
    Case("1d, stride 3, ceil", 2, 3, (13,), (4,), (3,), (2,), ceil=True),
    Case("1d, disjoint", 2, 16, (12,), (2,), (2,)),
    Case("1d, dilated", 2, 8, (13,), (3,), (2,), (1,), (3,)),
    Case("1d, dilated, stride 1, ceil", 1, 3, (11,), (4,), (1,), (2,), (2,), True),
    Case("1d, gaps between windows", 2, 8, (14,), (2,), (4,)),
    Case("1d, 31 taps", 1, 8, (40,), (31,), (3,), (15,)),
    Case("1d, 300 taps", 1, 2, (700,), (300,), (150,), (150,)),
    Case("ResNet's", 2, 64, (8, 8), (3, 3), (2, 2), (1, 1)),
    Case("VGG's", 2, 16, (8, 6), (2, 2), (2, 2)),
    Case("GoogLeNet's", 1, 24, (7, 7), (3, 3), (1, 1), (1, 1)),
    Case("GoogLeNet's, ceil", 2, 8, (8, 8), (3, 3), (2, 2), (0, 0), ceil=True),
    Case("one channel", 3, 1, (7, 9), (3, 2), (2, 1), (1, 0)),
    Case("three channels", 2, 3, (9, 5), (3, 3), (2, 2), (1, 1)),
    Case("seventeen channels", 2, 17, (6, 5), (2, 3), (1, 2), (1, 1), ceil=True),
    Case("stride 3", 1, 8, (11, 10), (3, 3), (3, 3)),
    Case("stride 3, overlapping", 1, 4, (11, 12), (5, 4), (3, 3), (2, 1)),
    Case("stride 3, ceil", 2, 8, (8, 10), (2, 3), (3, 3), (1, 0), ceil=True),
    Case("asymmetric", 1, 8, (5, 12), (1, 4), (2, 3), (0, 2)),
    Case("stride 4: more pixels than a thread has", 1, 8, (12, 9), (4, 4), (4, 4)),
    Case("dilated", 1, 8, (9, 10), (3, 2), (1, 2), (1, 0), (2, 3)),
    Case("dilated, ceil", 2, 3, (9, 8), (2, 3), (2, 2), (0, 1), (3, 2), True),
    Case("5x5 of YOLO", 1, 8, (7, 6), (5, 5), (1, 1), (2, 2)),
    Case("36 taps", 1, 8, (9, 8), (6, 6), (2, 2), (3, 3)),
    Case("289 taps", 1, 8, (19, 18), (17, 17), (8, 8), (8, 8)),
    Case("the whole image", 3, 8, (6, 7), (6, 7), (1, 1)),
    Case("a single pixel", 2, 8, (1, 1), (1, 1), (1, 1)),
    Case("window 1, stride 2", 2, 8, (5, 6), (1, 1), (2, 2)),
    Case("3d", 1, 8, (5, 6, 5), (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    Case("3d, disjoint", 1, 3, (4, 4, 6), (2, 2, 2), (2, 2, 2)),
    Case("3d, stride 1", 1, 4, (3, 4, 4), (2, 3, 2), (1, 1, 1), (1, 1, 1)),
    Case("3d, stride 3, ceil", 1, 8, (7, 5, 5), (3, 2, 3), (3, 3, 2), (1, 0, 1), ceil=True),
    Case("3d, dilated", 1, 4, (7, 6, 5), (2, 3, 2), (1, 2, 1), (1, 0, 0), (3, 2, 2)),
    Case("3d, 48 taps", 1, 3, (5, 6, 5), (3, 4, 4), (1, 2, 2), (1, 2, 0)),
)
# 289 taps are left out: other cases have many.
PLAIN = tuple(case for case in CASES if set(case.dilation) <= {1} and case.name != "289 taps")
# (size, output size)
ADAPTIVE = {
    "1d": ((11,), (4,)),
    "1d, larger than the input": ((3,), (7,)),
    "1d, global": ((9,), (1,)),
    "2d": ((7, 10), (3, 4)),
    "2d, equal shares": ((8, 6), (4, 2)),
    "2d, global": ((7, 7), (1, 1)),
    "2d, as it is": ((5, 4), (5, 4)),
    "2d, larger and smaller": ((3, 9), (5, 2)),
    "2d, large shares": ((20, 13), (2, 1)),
    "3d": ((4, 5, 6), (2, 3, 4)),
    "3d, global": ((3, 4, 5), (1, 1, 1)),
}

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def laid_out(t: Tensor, channels_last: bool) -> Tensor:
    t = t.to(DEVICE)
    return torch.empty_strided(t.shape, strides_like(t.shape, channels_last), dtype=t.dtype, device=DEVICE).copy_(t)


def awkward(shape: Ints, dtype: torch.dtype = torch.float32) -> Tensor:
    """Few distinct integers, zeros of either sign, two neighbouring NaN and an image's first channel of -inf."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, shape, generator=generator).to(dtype)
    x = torch.where((x == 0) & (torch.rand(shape, generator=generator) < 0.5), -x, x)
    x[-1, -1].view(-1)[:2] = torch.nan
    x[0, 0] = -torch.inf
    return x


def function(name: str, rank: int) -> Any:
    return getattr(torch.nn.functional, f"{name}{rank}d")


def scattered(dy: Tensor, indices: Tensor, size: Ints) -> Tensor:
    """The input's gradient in fp64 by PyTorch's indices."""
    shape = (*dy.shape[:2], *size)
    return (
        torch.zeros(shape, dtype=torch.float64)
        .flatten(2)
        .scatter_add_(2, indices.flatten(2), dy.flatten(2))
        .view(shape)
    )


def same(value: Tensor, reference: Tensor, what: str) -> None:
    """Equal, NaN to NaN."""
    torch.testing.assert_close(value.cpu(), reference, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")


def check_max(
    x: Tensor, size: Ints, geometry: pool.Geometry, index: torch.dtype, y: Tensor, indices: Tensor, last: bool
) -> set[str]:
    """Forward with and without taps, their indices, backward and its derivative; the kernels that ran."""
    operand = laid_out(x, last)
    last = is_channels_last(operand.shape, operand.stride())
    with record() as records:
        value, taps = pool.max_pool(operand, size, geometry, index)
        (inferred,) = pool.max_pool(operand, size, geometry, None)
        same(value, y, "maxima")
        same(inferred, y, "maxima without taps")
        assert taps.dtype == index and taps.stride() == value.stride()
        same(pool.max_pool_indices(taps, tuple(x.shape[2:]), geometry, last), indices, "indices")
        dy = torch.randint(-4, 5, y.shape, generator=torch.Generator().manual_seed(1))
        gradient = laid_out(dy.to(x.dtype), last)
        dx = pool.max_pool_backward(gradient, taps, tuple(x.shape[2:]), geometry, last)
        assert_equal(dx, scattered(dy.double(), indices, tuple(x.shape[2:])), "gradient")
        same(pool.max_pool_gather(taps, operand, geometry, last), y, "what lies at the maxima")
    for t in (value, dx):
        assert is_channels_last(t.shape, t.stride()) == last or 1 in (t.shape[1], t[0, 0].numel())
    return {r.name for r in records}


@each_case
def test_max_is_pytorchs(case: Case, record_property) -> None:
    position = CASES.index(case)
    x = awkward((case.n, case.c, *case.size), DTYPES[position % 3])
    y, indices = function("max_pool", case.rank)(x, *case.geometry, case.ceil, True)
    names = check_max(x, tuple(y.shape[2:]), case.geometry, case.index, y, indices, position % 2 == 0)
    assert names <= {"pool_kernel", "pool_gather_kernel", "pool_gradient_kernel", "pool_pixel_gradient_kernel"}
    assert len(names) == 3
    record_property("problem", ("pool", "max", case.name))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_max_is_pytorchs(name: str) -> None:
    size, output = ADAPTIVE[name]
    position = list(ADAPTIVE).index(name)
    x = awkward((2, (8, 3)[position % 2], *size), DTYPES[position % 3])
    y, indices = function("adaptive_max_pool", len(size))(x, output, return_indices=True)
    check_max(x, output, pool.ADAPTIVE, pool.tap_type(size, output, ()), y, indices, position % 4 < 2)


def averages(
    x: Tensor, size: Ints, geometry: pool.Geometry, include: bool, divisor: int, last: bool, dy: Tensor
) -> tuple[Tensor, Tensor]:
    operand, gradient = laid_out(x, last), laid_out(dy, last)
    last = is_channels_last(operand.shape, operand.stride())
    y = pool.average_pool(operand, size, geometry, include, divisor)
    return y, pool.average_pool_backward(gradient, tuple(x.shape[2:]), geometry, last, include, divisor)


def check_average(reference: Any, run: Any, shape: Ints, dtype: torch.dtype, depth: int) -> None:
    """``reference(x)`` and ``run(x, dy, output size)`` on random values: forward and backward."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    exact, magnitude = x.double().requires_grad_(), x.double().abs().requires_grad_()
    expected, bound = reference(exact), reference(magnitude)
    dy = torch.randn(expected.shape, generator=generator).to(dtype)
    y, dx = run(x, dy, tuple(expected.shape[2:]))
    (gradient,) = torch.autograd.grad(expected, exact, dy.double())
    (gradient_bound,) = torch.autograd.grad(bound, magnitude, dy.double().abs())
    assert_close(y, expected.detach(), bound.detach().abs(), depth, "average")
    assert_close(dx, gradient, gradient_bound, depth, "gradient")


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_average_within_rounding(case: Case, record_property) -> None:
    position = CASES.index(case)
    include, last = position % 4 < 2, position % 2 == 1
    window, stride, padding, _ = case.geometry
    divisor = 5 if position % 5 == 0 and case.rank > 1 else 0
    options = (case.ceil, include) + ((divisor or None,) if case.rank > 1 else ())
    check_average(
        lambda x: function("avg_pool", case.rank)(x, window, stride, padding, *options),
        lambda x, dy, size: averages(x, size, case.geometry, include, divisor, last, dy),
        (case.n, case.c, *case.size),
        DTYPES[position % 3],
        torch.Size(window).numel(),
    )
    record_property("problem", ("pool", "average", case.name))


@pytest.mark.parametrize("include", [True, False], ids=["with padding", "without padding"])
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "planes"])
def test_sums_are_exact_on_integers(include: bool, last: bool) -> None:
    """Divisors are one, or powers of two: windows at the edges hold 4, 2 and 1 pixels."""
    x = torch.randint(-9, 10, (2, 8, 6, 8), generator=torch.Generator().manual_seed(0)).float()
    for divisor, window, padding in ((1, (3, 3), (1, 1)), (0, (2, 2), (1, 1))):
        exact = x.double().requires_grad_()
        expected = torch.nn.functional.avg_pool2d(exact, window, 2, padding, False, include, divisor or None)
        dy = torch.randint(-8, 9, expected.shape, generator=torch.Generator().manual_seed(1)).float()
        geometry = window, (2, 2), padding, (1, 1)
        y, dx = averages(x, tuple(expected.shape[2:]), geometry, include, divisor, last, dy)
        assert_equal(y, expected.detach(), "average")
        assert_equal(dx, torch.autograd.grad(expected, exact, dy.double())[0], "gradient")


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_average_within_rounding(name: str) -> None:
    size, output = ADAPTIVE[name]
    position = list(ADAPTIVE).index(name)
    check_average(
        lambda x: function("adaptive_avg_pool", len(size))(x, output),
        lambda x, dy, out: averages(x, out, pool.ADAPTIVE, True, 0, position % 4 < 2, dy),
        (2, (3, 8)[position % 2], *size),
        DTYPES[position % 3],
        torch.Size(size).numel(),
    )


NORMS = (2.0, 3.0, 1.0, 2.5, -1.0, 0.5, 4.0)


def norms(
    x: Tensor, size: Ints, window: Ints, stride: Ints, norm: float, last: bool, dy: Tensor
) -> tuple[Tensor, Tensor]:
    operand, gradient = laid_out(x, last), laid_out(dy, last)
    last = is_channels_last(operand.shape, operand.stride())
    rank = len(window)
    geometry = window, stride, (0,) * rank, (1,) * rank
    with record() as records:
        y = pool.lp_pool(operand, size, geometry, norm)
        dx = pool.lp_pool_backward(gradient, y, operand, geometry, last, norm)
    assert [r.launch.constants["NORM"] for r in records] == [norm if norm in (1, 2) else 3] * 2
    return y, dx


def pytorchs_norms(x: Tensor, window: Ints, stride: Ints, norm: float, ceil: bool) -> Tensor:
    # In rank 1 it takes no tuples.
    return function("lp_pool", len(window))(x, norm, *((window, stride) if window[1:] else window + stride), ceil)


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_norms_within_rounding(case: Case, record_property) -> None:
    """Numbers are positive, so that no sum is ill-conditioned."""
    position = CASES.index(case)
    norm, dtype = NORMS[position % 7], DTYPES[position % 3]
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand((case.n, case.c, *case.size), generator=generator) + 0.5).to(dtype)
    exact = x.double().requires_grad_()
    expected = pytorchs_norms(exact, case.window, case.stride, norm, case.ceil)
    dy = torch.randn(expected.shape, generator=generator).to(dtype)
    y, dx = norms(x, tuple(expected.shape[2:]), case.window, case.stride, norm, position % 2 == 0, dy)
    gradient, bound = (
        torch.autograd.grad(expected, exact, t, retain_graph=True)[0] for t in (dy.double(), dy.double().abs())
    )
    taps = torch.Size(case.window).numel()
    # Logarithms of powers lose 1e-6 of y, and of dx as often as it is multiplied by itself.
    assert_close(y, expected.detach(), expected.detach(), taps, "norm", 1e-6)
    rounded = abs(norm - 1.0) * torch.finfo(dtype).eps
    assert_close(dx, gradient, bound, taps, "gradient", rounded + 1e-6 * (1.0 + abs(norm)))
    record_property("problem", ("pool", "lp", case.name))


@pytest.mark.parametrize("window", [2, 6], ids=["unrolled", "a loop"])
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "planes"])
@pytest.mark.parametrize("norm", [*NORMS, -2.0, -0.5, 5.0])
def test_norms_of_zeros_negative_sums_and_nan_are_pytorchs(norm: float, last: bool, window: int) -> None:
    """Gradients too: 0 for a sum of zero, NaN for a root that is NaN."""
    zeros, signs, nan = torch.zeros(2, 2), torch.tensor([[-1.0, -2.0], [1.0, -1.0]]), torch.tensor([[-3.0, torch.nan]])
    windows = [zeros, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), signs, -signs, nan.expand(2, 2), torch.full((2, 2), 2.0)]
    x = torch.stack([t.tile(window // 2, window // 2) for t in windows]).view(2, 3, window, window)
    # A window over the edge, half of whose column and all of whose row are missing.
    exact = torch.nn.functional.pad(x, (0, 1)).double().requires_grad_()
    expected = torch.nn.functional.lp_pool2d(exact, norm, window, window // 2, True)
    dy = torch.ones_like(expected)
    (gradient,) = torch.autograd.grad(expected, exact, dy)
    size, square = tuple(expected.shape[2:]), (window, window)
    y, dx = norms(exact.detach().float(), size, square, (window // 2,) * 2, norm, last, dy.float())
    for value, reference, what in ((y, expected.detach(), "norms"), (dx, gradient, "gradient")):
        torch.testing.assert_close(
            value.cpu().double(), reference, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda m, w=what: f"{w}: {m}"
        )


def named_tile(monkeypatch, **config: int) -> None:
    """Every pool's tile."""
    take_tile(monkeypatch, {"LINES": 1, "LANES": 1, "SPLITS": 1, **config}, ("pool",))


@pytest.mark.parametrize("lines", [1, 2, 4])
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "planes"])
def test_tile_edges_of_unrolled_windows(lines: int, last: bool, monkeypatch) -> None:
    """The interpreter's own tiles cover small problems whole; here tiles end inside rows, columns and blocks."""
    named_tile(monkeypatch, BLOCK=32, LINES=lines)
    for window, stride, padding in (
        ((3, 3), (2, 1), (1, 1)),
        ((2, 3), (2, 2), (0, 1)),
        ((3, 2), (1, 2), (1, 1)),
        ((2, 1), (2, 1), (0, 0)),
    ):
        geometry = window, stride, padding, (1, 1)
        # Columns of 5 outputs and of 10, which neither 2 nor 4 of a thread divide evenly.
        x = awkward((1, 5, 10, 5))
        y, indices = torch.nn.functional.max_pool2d(x, *geometry, return_indices=True)
        check_max(x, tuple(y.shape[2:]), geometry, torch.uint8, y, indices, last)
    check_average(
        lambda x: torch.nn.functional.avg_pool2d(x, 3, 1, 1, False, False),
        lambda x, dy, size: averages(x, size, ((3, 3), (1, 1), (1, 1), (1, 1)), False, 0, last, dy),
        (1, 5, 7, 5),
        torch.float32,
        9,
    )


@pytest.mark.parametrize(("lanes", "splits", "last"), [(4, 1, True), (4, 1, False), (1, 3, True), (8, 9, False)])
def test_large_windows_shared_by_lanes_and_splits(lanes: int, splits: int, last: bool, monkeypatch) -> None:
    named_tile(monkeypatch, BLOCK=256, LANES=lanes, SPLITS=splits)
    cases = [("adaptive_max_pool", size, output, ()) for size, output in (((6, 7), (1, 1)), ((3, 4, 5), (1, 1, 1)))]
    cases += [
        ("adaptive_max_pool", (13, 8), (2, 1), ()),
        ("max_pool", (8, 7), (2, 2), ((6, 6), (2, 3), (3, 2), (1, 1))),
    ]
    for name, size, output, geometry in cases:
        x = awkward((2, 5, *size))
        y, indices = function(name, len(size))(x, *(geometry or (output,)), return_indices=True)
        operand, output = laid_out(x, last), tuple(y.shape[2:])
        geometry = geometry or pool.ADAPTIVE
        with record() as records:
            value, taps = pool.max_pool(operand, output, geometry, torch.int16)
            (inferred,) = pool.max_pool(operand, output, geometry, None)
        same(value, y, f"maxima of {size}")
        same(inferred, y, f"maxima of {size} without taps")
        same(pool.max_pool_indices(taps, size, geometry, last), indices, f"indices of {size}")
        assert [r.name for r in records] == ["pool_kernel", *["pool_combine_kernel"] * (splits > 1)] * 2
        if geometry == pool.ADAPTIVE:
            x = torch.randn(x.shape, dtype=torch.float64)
            expected, bound = (function("adaptive_avg_pool", len(size))(t, output) for t in (x, x.abs()))
            average = pool.average_pool(laid_out(x.float(), last), output, geometry, True, 0)
            assert_close(average, expected, bound, 60, f"average of {size}", 1e-6)


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "planes"])
def test_large_norms_shared_by_lanes(last: bool, monkeypatch) -> None:
    named_tile(monkeypatch, BLOCK=256, LANES=8)
    x = torch.rand((2, 5, 8, 7), generator=torch.Generator().manual_seed(0)) + 0.5
    for norm in (2.0, 3.0):
        expected = torch.nn.functional.lp_pool2d(x.double(), norm, 6, 1)
        y = pool.lp_pool(laid_out(x, last), (3, 2), ((6, 6), (1, 1), (0, 0), (1, 1)), norm)
        assert_close(y, expected, expected, 36, f"norm {norm}", 1e-6)


def test_tap_types() -> None:
    assert [index_type(taps) for taps in (1, 255, 256, 32768, 32769)] == [
        *(torch.uint8, torch.uint8, torch.int16, torch.int16, torch.int32)
    ]
    # No tap of an adaptive window is out of its type's range.
    for h, p in product(range(1, 40), range(1, 40)):
        shares = [-(-(i + 1) * h // p) - i * h // p for i in range(p)]
        assert max(shares) == largest_share(h, p)
        assert max(shares) <= (h - 2) // p + 2


def test_more_taps_than_16_bits_count(monkeypatch) -> None:
    named_tile(monkeypatch, BLOCK=4096, LANES=4096)
    x = torch.zeros(1, 2, 40000)
    x[0, 0, 39998] = x[0, 0, 39999] = 1.0
    y, taps = pool.max_pool(x.to(DEVICE), (1,), pool.ADAPTIVE, pool.tap_type((40000,), (1,), ()))
    assert taps.dtype == torch.int32 and taps.flatten().tolist() == [39998, 0] and y.flatten().tolist() == [1.0, 0.0]


class NoCopies(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.copy_:
            raise AssertionError("a copy")
        return func(*args, **(kwargs or {}))


def test_strides_are_taken_from_the_tensors() -> None:
    """Crops of either format and gradients that are slices are read where they lie."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-9, 10, shape, generator=generator).float().to(DEVICE)

    geometry = (3, 3), (2, 2), (1, 1), (1, 1)
    nhwc, nchw = integers(2, 8, 10, 24)[:, 1:, ::2, 4:20].permute(0, 3, 1, 2), integers(2, 8, 24, 10)[:, :, 3:12, 2:]
    for x, last in ((nhwc, True), (nchw, False)):
        y, indices = torch.nn.functional.max_pool2d(x.cpu(), *geometry, return_indices=True)
        n, c, p, q = y.shape
        dy = (
            integers(n, p, q, 2 * c)[..., 4 : c + 4].permute(0, 3, 1, 2) if last else integers(n, c, p + 1, q)[:, :, 1:]
        )
        assert x.shape[1] == c and not x.is_contiguous() and not dy.is_contiguous()
        with NoCopies():
            value, taps = pool.max_pool(x, (p, q), geometry, torch.uint8)
            dx = pool.max_pool_backward(dy, taps, tuple(x.shape[2:]), geometry, last)
        same(value, y, "maxima of a crop")
        assert_equal(dx, scattered(dy.cpu().double(), indices, tuple(x.shape[2:])), "gradient from a slice")


def test_operands_of_other_strides_are_copied() -> None:
    """Expanded gradients, every other channel, channels of several images of planes."""
    x = torch.randint(-9, 10, (2, 6, 5, 5), generator=torch.Generator().manual_seed(0)).float().to(DEVICE)
    geometry = (2, 2), (1, 1), (0, 0), (1, 1)
    for view in (x[:, ::2], x[:, 1:4], x.contiguous(memory_format=torch.channels_last)[:, ::2], x.transpose(2, 3)):
        y = pool.average_pool(view, (4, 4), geometry, True, 0)
        assert_equal(y, torch.nn.functional.avg_pool2d(view.cpu().double(), 2, 1), "average of a view")
        assert is_channels_last(y.shape, y.stride()) == is_channels_last(view.shape, view.stride())
    dx = pool.average_pool_backward(torch.ones((), device=DEVICE).expand(2, 6, 4, 4), (5, 5), geometry, True, True, 0)
    assert dx.cpu().sum() == 2 * 6 * 16


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "planes"])
def test_wide_offsets_give_the_same(last: bool, monkeypatch) -> None:
    for module in (pool_window, pool_gradient):
        monkeypatch.setattr(module, "needs_int64", lambda *operands: True)
    monkeypatch.setattr(call, "_calls", {})
    for case in (CASES[13], CASES[24], CASES[29]):
        x = awkward((case.n, case.c, *case.size))
        y, indices = function("max_pool", case.rank)(x, *case.geometry, case.ceil, True)
        check_max(x, tuple(y.shape[2:]), case.geometry, case.index, y, indices, last)


def test_offsets_past_2_to_31_elements_are_wide() -> None:
    """Only on the host, because the tensors fit no test machine. A smaller size stays narrow."""
    for direction, size in product(("forward", "backward"), (4096, 4098)):
        outputs = (size // 2, size // 2)
        problem = PoolProblem(
            "max", 2, 64, (size, size), outputs, (2, 2), (2, 2), (0, 0), (1, 1), torch.bfloat16, index=torch.uint8
        )
        constants = dispatch.plan(direction, problem, gpus.H200).launches[0].constants
        # dx has 2^31 elements and more, dy a quarter.
        assert constants["WIDE"] is (size > 4096), direction


def test_the_same_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 9, 9, generator=generator).to(DEVICE)
    geometry = (5, 5), (2, 2), (2, 2), (1, 1)
    dy = torch.randn(2, 16, 5, 5, generator=generator).to(DEVICE)
    runs = [
        (
            pool.average_pool(x, (5, 5), geometry, False, 0),
            pool.average_pool_backward(dy, (9, 9), geometry, False, False, 0),
            pool.max_pool_backward(
                dy, pool.max_pool(x, (5, 5), geometry, torch.uint8)[1], (9, 9), geometry, False
            ),
        )
        for _ in range(2)
    ]  # fmt: skip
    assert all(map(torch.equal, *runs))


def test_empty_tensors_launch_nothing() -> None:
    x = torch.zeros(0, 4, 6, 6, device=DEVICE)
    geometry = (2, 2), (2, 2), (0, 0), (1, 1)
    with record() as records:
        y, taps = pool.max_pool(x, (3, 3), geometry, torch.uint8)
        assert y.shape == taps.shape == (0, 4, 3, 3)
        assert pool.max_pool_backward(y, taps, (6, 6), geometry, False).shape == x.shape
        assert pool.max_pool_indices(taps, (6, 6), geometry, False).shape == y.shape
        assert pool.average_pool(x, (0, 0), pool.ADAPTIVE, True, 0).shape == (0, 4, 0, 0)
        # No output at all: nothing reaches the input.
        dy = torch.zeros(2, 4, 0, 3, device=DEVICE)
        assert not pool.average_pool_backward(dy, (6, 6), pool.ADAPTIVE, False, True, 0).any()
    assert not records


def test_uncovered_problems_say_why() -> None:
    def problem(size: Ints, output: Ints, adaptive: bool) -> PoolProblem:
        ones, zeros = (1,) * len(size), (0,) * len(size)
        return PoolProblem("average", 2, 1, size, output, ones, ones, zeros, ones, torch.float32, adaptive)

    huge = dispatch.plan("forward", problem((2**16, 2**15), (2**16, 2**15), False), gpus.H200)
    assert huge.family == "pytorch" and "2^31 pixels" in huge.reasons[0][1]
    shares = dispatch.plan("forward", problem((2**17,), (2**15,), True), gpus.H200)
    assert shares.family == "pytorch" and "adaptive axis" in shares.reasons[0][1]
    old = gpus.describe("NVIDIA T4", 75, 40, 64 << 10, 4 << 20, None)
    plan = dispatch.plan("backward", problem((8,), (4,), True), old)
    assert plan.reasons == (("every family", "the NVIDIA T4's compute capability 7.5 is below 8.0"),)
    assert dispatch.plan("backward", problem((8,), (4,), True), gpus.H200).family == "pool"


def test_batch_one_fills_the_gpu() -> None:
    """Windows that are too few are split, over rows of a tile and over programs."""
    sizes = {"channels": 64, "input_size": (224, 224), "output_size": (1, 1), "window": (224, 224)}
    problem = PoolProblem(
        "average", 1, **sizes, stride=(1, 1), padding=(0, 0), dilation=(1, 1), dtype=torch.bfloat16, adaptive=True
    )
    first, second = dispatch.plan("forward", problem, gpus.H200).launches
    assert first.constants["LINEAR"] and first.grid[0] * first.grid[1] > gpus.H200.multiprocessors / 2
    assert second.name == "split_sum_kernel"


def test_bytes_and_description() -> None:
    problem = PoolProblem(
        "max", 2, 8, (6, 8), (3, 4), (3, 2), (2, 2), (1, 0), (1, 1), torch.bfloat16, index=torch.uint8
    )
    assert problem.bytes == 2 * 8 * (48 * 2 + 12 * 3)
    assert problem.describe() == "max N2 C8 6x8 -> 3x4 3x2 stride 2 padding 1x0 bfloat16"
    average = PoolProblem("average", 2, 8, (7, 7), (1, 1), (7, 7), (1, 1), (0, 0), (1, 1), torch.float32, True)
    assert average.bytes == 2 * 8 * (49 + 1) * 4
    assert average.describe() == "adaptive average N2 C8 7x7 -> 1x1 float32"
    lp = PoolProblem("lp", 2, 8, (8,), (4,), (2,), (2,), (0,), (1,), torch.float32, norm=2.5)
    assert lp.describe() == "lp 2.5 N2 C8 8 -> 4 2 stride 2 float32" and lp.bytes == 2 * 8 * 12 * 4
