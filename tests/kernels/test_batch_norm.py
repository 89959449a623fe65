"""Batch norm's kernels against fp64: statistics combined, applied, and every sum and gradient of backward.

Memory is poisoned as in the convolution's tests: an element that no program wrote, or that was read past an end, is
a NaN.
"""

from dataclasses import dataclass
from math import nan, prod

import pytest
import torch
from torch import Tensor

from fastconv.kernels.families import batch_norm as family
from fastconv.kernels.families.batch_norm import Activated
from fastconv.kernels.jit.activations import ACTIVATIONS
from fastconv.kernels.launch.launch import record
from fastconv.kernels.ops import batch_norm, call, conv
from reference import assert_close
from tests.marks import DEVICE, runs_kernels
from tests.tiles import take_tile

pytestmark = runs_kernels
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = torch.finfo(torch.float32).eps


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def within(value: Tensor, reference: Tensor, bound: Tensor, what: str) -> None:
    error = (value.cpu().double() - reference).abs()
    assert bool((error <= bound).all()), f"{what}: off by {error.max():.2e}, {(error / bound).max():.1f} bounds"


def assert_statistics(mean: Tensor, var: Tensor, x: Tensor, what: str) -> None:
    """Statistics of x [rows, K], which is fp64: the mean to a few roundings, the variance to the error of that mean."""
    assert mean.dtype == var.dtype == torch.float32
    true_var, true_mean = torch.var_mean(x, 0, correction=0)
    rounding = 4 * EPS * (true_mean.abs() + true_var.sqrt())
    within(mean, true_mean, rounding, f"mean of {what}")
    within(var, true_var, 1e-5 * true_var + 2 * rounding * true_var.sqrt() + rounding**2, f"variance of {what}")


def partials(x: Tensor, *rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """(counts, means, sums of squares) of tiles of x, as an epilogue leaves them; the last of ``rows`` repeats."""
    sizes = [min(rows[0], len(x))] if len(rows) == 1 else list(rows)
    while sum(sizes) < len(x):
        sizes.append(min(sizes[-1], len(x) - sum(sizes)))
    tiles = [torch.var_mean(tile, 0, correction=0) if len(tile) else (x[0] * 0,) * 2 for tile in x.split(sizes)]
    counts = torch.tensor(sizes)
    means = torch.stack([mean for _, mean in tiles])
    squares = torch.stack([var for var, _ in tiles]) * counts[:, None]
    return counts.float().to(DEVICE), means.float().to(DEVICE), squares.float().to(DEVICE)


@pytest.mark.parametrize(
    "spread", [(0.0, 1.0), (1000.0, 1e-3), (-3.0, 100.0)], ids=lambda s: f"mean {s[0]}, var {s[1]}"
)
@pytest.mark.parametrize(
    ("pixels", "rows", "channels"),
    [
        (1, 16, 3),  # one row
        (16, 16, 8),
        (33, 16, 33),  # a last tile of one row, and channels past one block
        (100, 3, 7),
        (8 * 2, 2, 5),  # the most that one level takes
        (8 * 2 + 1, 2, 5),  # one more: two levels, and a share that is mostly empty
        (50 * 2 - 1, 2, 34),
        (61, 1, 4),  # a row a tile
    ],
)
def test_partials_combine_to_the_whole(
    pixels: int, rows: int, channels: int, spread: tuple[float, float], monkeypatch
) -> None:
    monkeypatch.setattr(batch_norm, "MAX_PARTIALS", 8)
    mean, var = spread
    x = torch.randn(pixels, channels, dtype=torch.float64, generator=generator()) * var**0.5 + mean
    x = x.float().double()
    with record() as records:
        found = batch_norm.combine_statistics(*partials(x, rows))
    assert len(records) == (2 if -(-pixels // rows) > 8 else 1)
    assert_statistics(*found, x, f"{pixels} pixels by {rows}")
    again = batch_norm.combine_statistics(*partials(x, rows))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_many_partials_are_combined_in_two_levels() -> None:
    x = torch.randn(257, 3, dtype=torch.float64, generator=generator()).float().double()
    with record() as records:
        found = batch_norm.combine_statistics(*partials(x, 1))
    assert [r.launch.grid[1] for r in records] == [129, 1]
    assert_statistics(*found, x, "257 pixels")


def test_partials_differ_wildly() -> None:
    """Each tile has a mean of its own, some almost no variance: nothing cancels."""
    centres = torch.tensor([0.0, 1e4, -1e4, 5.0, 5.0]).repeat_interleave(4)[:, None].double()
    x = (centres + torch.randn(20, 6, dtype=torch.float64, generator=generator()) * 1e-2).float().double()
    assert_statistics(*batch_norm.combine_statistics(*partials(x, 4)), x, "distant tiles")


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_partials_of_any_size(mean: float, monkeypatch) -> None:
    """Phases of a transposed convolution leave some without a row: the first, the last, a whole share."""
    monkeypatch.setattr(batch_norm, "MAX_PARTIALS", 4)
    x = (torch.randn(37, 5, dtype=torch.float64, generator=generator()) + mean).float().double()
    rows = (0, 0, 16, 3, 0, 7, 0, 0, 10, 1, 0)
    assert_statistics(*batch_norm.combine_statistics(*partials(x, *rows)), x, "uneven tiles")
    nothing = batch_norm.combine_statistics(*(torch.zeros(shape, device=DEVICE) for shape in ((3,), (3, 5), (3, 5))))
    assert not any(t.any() for t in nothing)


def name_tile(monkeypatch, **sizes: int) -> None:
    take_tile(monkeypatch, sizes, ("conv_gather", "pass"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "outputs", "groups"),
    [((1, 5, 3, 3), 20, 1), ((20, 8, 1, 1), 16, 1), ((100, 4, 1, 2), 7, 1), ((20, 8, 2, 1), 40, 2)],
    ids=str,
)
def test_statistics_from_the_accumulator(
    shape: tuple[int, ...], outputs: int, groups: int, dtype: torch.dtype, monkeypatch, set_fp32_precision
) -> None:
    """Statistics are of the fp32 result before it is rounded, without rows past the last pixel, which hold the bias."""
    set_fp32_precision("ieee")  # so that only sums round
    name_tile(monkeypatch, BLOCK_M=16, BLOCK_K=16, BLOCK_C=16, SPLITS=1)
    x = torch.randn(shape, generator=generator()).to(dtype)
    weight = torch.randn(outputs, shape[1] // groups, 1, 1, generator=generator()).to(dtype)
    bias = torch.full((outputs,), 7.0, dtype=dtype)
    y, mean, var = conv.conv_statistics(
        x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), None, (1, 1), (0,) * 4, (1, 1), groups
    )
    exact = torch.conv2d(x.double(), weight.double(), bias.double(), groups=groups)
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == dtype
    torch.testing.assert_close(y.cpu(), exact.to(dtype))
    assert_statistics(mean, var, exact.transpose(0, 1).flatten(1).T, f"{shape} in {dtype}")


def test_statistics_of_a_mean_far_from_zero(monkeypatch, set_fp32_precision) -> None:
    """Mean 1000, variance 1e-3; the filter copies, so that the convolution itself rounds nothing."""
    set_fp32_precision("ieee")
    name_tile(monkeypatch, BLOCK_M=16, BLOCK_K=16, BLOCK_C=16, SPLITS=1)
    x = (1000 + torch.randn(9, 6, 5, 3, generator=generator()) * 1e-3**0.5).to(DEVICE)
    weight = torch.eye(6).view(6, 6, 1, 1).to(DEVICE)
    y, *found = conv.conv_statistics(x, weight, None, None, (1, 1), (0,) * 4, (1, 1), 1)
    assert torch.equal(y, x)
    assert_statistics(*found, x.cpu().double().transpose(0, 1).flatten(1).T, "mean 1000")


def test_statistics_of_an_empty_batch_are_zero() -> None:
    x, weight = torch.zeros(0, 4, 3, 3, device=DEVICE), torch.ones(5, 4, 1, 1, device=DEVICE)
    with record() as records:
        y, mean, var = conv.conv_statistics(x, weight, None, None, (1, 1), (0,) * 4, (1, 1), 1)
    assert not records and y.shape == (0, 5, 3, 3)
    assert torch.equal(mean.cpu(), torch.zeros(5)) and torch.equal(var.cpu(), torch.zeros(5))


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...] = (2, 24, 5, 3)
    act: str = "relu"
    a: float = 0.0
    b: float = 0.0
    affine: bool = True
    residual: str | None = None  # "before" or "after" the activation

    @property
    def how(self) -> Activated:
        return Activated(1e-5, self.act, self.a, self.b, self.residual == "after")


CASES = (
    Case("relu"),
    Case("no activation", act="identity"),
    Case("19 channels", (3, 19, 2, 3)),
    Case("one channel", (5, 1, 7)),
    Case("one pixel an image", (9, 16, 1, 1)),
    Case("3d", (1, 8, 2, 3, 2), act="silu"),
    Case("no affine", affine=False),
    Case("relu6", act="hardtanh", b=0.9),
    Case("clamped to what narrow types round", act="hardtanh", a=-0.3, b=0.7),
    Case("leaky", act="leaky_relu", a=0.1),
    Case("prelu", act="prelu"),
    Case("prelu, residual before", act="prelu", residual="before"),
    Case("hardswish", act="hardswish"),
    Case("gelu", act="gelu"),
    Case("residual before relu", residual="before"),
    Case("residual after relu", residual="after"),
    Case("residual alone", act="identity", residual="before"),
    Case("residual before silu", act="silu", residual="before", affine=False),
    Case("residual after mish, 17 channels", (2, 17, 3, 2), act="mish", residual="after"),
    Case("residual before relu6, 19 channels", (2, 19, 3, 2), act="hardtanh", b=1.0, residual="before"),
)


@dataclass
class Operands:
    """Operands in fp64 whose values ``dtype`` (vectors: fp32) holds exactly."""

    y: Tensor
    dz: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    var: Tensor
    slope: Tensor | None
    residual: Tensor | None


def operands(case: Case, dtype: torch.dtype, training: bool) -> Operands:
    draw = generator()
    k = case.shape[1]
    y, dz, residual = (torch.randn(case.shape, generator=draw).to(dtype).double() for _ in range(3))
    gamma, beta, mean, slope = (torch.randn(k, generator=draw).double() for _ in range(4))
    var = torch.rand(k, generator=draw).double() + 0.5
    if training:
        var, mean = torch.var_mean(y, [0, *range(2, y.dim())], correction=0)
        mean, var = mean.float().double(), var.float().double()
    return Operands(
        *(y, dz, gamma if case.affine else None, beta if case.affine else None, mean, var),
        *(slope if case.act == "prelu" else None, residual if case.residual else None),
    )


def expected(case: Case, o: Operands, training: bool) -> dict[str, Tensor]:
    """PyTorch's batch norm, activation and addition in fp64, with autograd's gradients."""
    leaves = {name: getattr(o, name) for name in ("y", "gamma", "beta", "slope", "residual")}
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items() if t is not None}
    u = torch.nn.functional.batch_norm(
        leaves["y"], o.mean.clone(), o.var.clone(), leaves.get("gamma"), leaves.get("beta"), training, eps=case.how.eps
    )
    residual = leaves.get("residual")
    a, b = torch.tensor([case.a, case.b]).tolist()
    x = u + residual if case.residual == "before" else u
    z = ACTIVATIONS[case.act].torch(x, leaves.get("slope", a), b)
    z = z + residual if case.residual == "after" else z
    gradients = torch.autograd.grad(z, list(leaves.values()), o.dz)
    found = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"z": z.detach(), "x": x.detach(), **found}


def on_device(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else batch_norm.as_pixels(t.to(dtype).to(DEVICE))


def computed(case: Case, o: Operands, dtype: torch.dtype, training: bool, from_z: bool) -> dict[str, Tensor]:
    y, dz, residual = (on_device(t, dtype) for t in (o.y, o.dz, o.residual))
    assert y is not None and dz is not None
    mean, var, gamma, beta, slope = (
        None if t is None else t.float().to(DEVICE) for t in (o.mean, o.var, o.gamma, o.beta, o.slope)
    )
    norm = mean, var, gamma, beta
    z = batch_norm.batch_norm_act(y, norm, slope, residual, case.how)
    derivative = (z if from_z else None), norm, slope, (None if from_z else residual)
    sums = batch_norm.batch_norm_act_sums(dz, y, *derivative, case.how)
    share = o.dz.shape[1] / o.dz.numel()
    arguments = (sums, share) if training else (None, 0.0)
    need_residual = case.residual == "before"
    dy, dresidual = batch_norm.batch_norm_act_gradient(dz, y, *derivative, *arguments, case.how, need_residual)
    assert (dresidual is not None) == need_residual
    found = {"z": z, "dy": dy, "dbeta": sums[0], "dgamma": sums[1], "dslope": sums[2]}
    return found if dresidual is None else {**found, "dresidual": dresidual}


def check(case: Case, dtype: torch.dtype, training: bool, from_z: bool = False) -> None:
    o = operands(case, dtype, training)
    references, values = expected(case, o, training), computed(case, o, dtype, training, from_z)
    pixels = prod(case.shape) // case.shape[1]
    rstd = (o.var + case.how.eps).rsqrt()

    def by_channel(t: Tensor) -> Tensor:
        return t.view(-1, *(1,) * (len(case.shape) - 2))

    xhat = (o.y - by_channel(o.mean)) * by_channel(rstd)
    slope = 1.0 if o.slope is None else by_channel(o.slope.abs() + 1)
    # Magnitudes that roundings are relative to: of a sum's terms, of a result.
    terms = o.dz.abs() * 2 * slope * (1 + references["x"].abs()) * (1 + xhat.abs())
    summed = terms.transpose(0, 1).flatten(1).sum(1)
    scale = by_channel(rstd * (1 if o.gamma is None else o.gamma.abs()))
    magnitudes = {
        "z": (1 + references["x"].abs() + references["z"].abs()) * slope,
        "dy": scale * (terms + by_channel(summed) * (1 + xhat.abs()) / pixels),
        "dresidual": terms,
        **dict.fromkeys(("dbeta", "dgamma", "dslope"), summed),
    }
    compared = {"z", "dy"} | (references.keys() & values.keys())
    assert compared >= {"z", "dy"} | ({"dbeta", "dgamma"} if case.affine else set())
    for name in sorted(compared):
        assert_close(values[name], references[name], magnitudes[name], 16, f"{name} of {case.name}")


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_backward(case: Case, dtype: torch.dtype, training: bool) -> None:
    check(case, dtype, training)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [c for c in CASES if ACTIVATIONS[c.act].from_output and c.residual != "after"], ids=lambda case: case.name
)
def test_derivative_from_the_output(case: Case, dtype: torch.dtype) -> None:
    if case.act == "hardtanh" and dtype is not torch.float32:
        # An inner value that rounds to a bound is one of z's: the reference must be blind to it too.
        o = operands(case, dtype, True)
        x, z = expected(case, o, True)["x"], expected(case, o, True)["z"]
        low, high = torch.tensor([case.a, case.b]).to(dtype).double().tolist()
        inner = (x > case.a) & (x < case.b)
        rounded = z.to(dtype).double()
        assert not (inner & ((rounded <= low) | (rounded >= high))).any(), "choose another seed"
    check(case, dtype, True, from_z=True)


TILES = {
    "tails of both axes": {"BLOCK_M": 16, "BLOCK_K": 16, "SPLITS": 2},
    "one tile over everything": {"BLOCK_M": 64, "BLOCK_K": 64, "SPLITS": 1},
    "more splits than steps": {"BLOCK_M": 16, "BLOCK_K": 32, "SPLITS": 7},
}


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize(
    "case",
    [
        Case("relu", (3, 20, 5, 3)),
        Case("prelu, residual", (2, 33, 3, 3), "prelu", residual="before"),
        Case("silu", (1, 40, 2, 2), "silu", residual="after"),
    ],
    ids=lambda case: case.name,
)
def test_tile_edges(case: Case, tile: dict[str, int], monkeypatch) -> None:
    """The interpreter's own tiles cover small problems whole; here tiles are small."""
    name_tile(monkeypatch, **tile)
    with record() as records:
        check(case, torch.float32, True)
    assert all(r.launch.constants["BLOCK_K"] == tile["BLOCK_K"] for r in records if r.name != "split_sum_kernel")
    assert any(r.name == "split_sum_kernel" for r in records) == (tile["SPLITS"] > 1)


@pytest.mark.parametrize("case", [CASES[0], CASES[10], CASES[14]], ids=lambda case: case.name)
def test_wide_offsets_give_the_same(case: Case, monkeypatch) -> None:
    monkeypatch.setattr(family, "INT32_MAX", 0)
    monkeypatch.setattr(call, "_calls", {})
    with record() as records:
        check(case, torch.float32, True)
    assert all(r.launch.constants["WIDE"] for r in records if r.name.startswith("batch_norm_act"))


def test_backward_is_the_same_bit_for_bit() -> None:
    case = Case("prelu", (3, 20, 5, 3), "prelu", residual="before")
    o = operands(case, torch.float32, True)
    first, second = (computed(case, o, torch.float32, True, False) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
def test_nan_goes_through(act: str) -> None:
    """z, dy and the sums hold the NaN, so that GradScaler sees it."""
    case = Case(act, (2, 16, 3, 3), act, 0.1, 1.0)
    o = operands(case, torch.float32, False)
    o.y[0, 3, 1, 1] = o.dz[1, 5, 0, 0] = nan
    values = computed(case, o, torch.float32, False, False)
    assert values["z"].isnan().nonzero().tolist() == [[0, 3, 1, 1]]
    assert values["dy"][1, 5, 0, 0].isnan() and values["dbeta"][5].isnan() and values["dgamma"][3].isnan()


def test_nan_of_the_input_reaches_prelus_slope() -> None:
    case = Case("prelu", (2, 16, 3, 3), "prelu")
    o = operands(case, torch.float32, False)
    o.y[0, 3, 1, 1] = nan
    assert computed(case, o, torch.float32, False, False)["dslope"].isnan().nonzero().tolist() == [[3]]


def test_an_empty_batch_launches_nothing() -> None:
    y = torch.zeros(0, 8, 3, 3, device=DEVICE)
    norm = tuple(torch.ones(8, device=DEVICE) for _ in range(4))
    how = Activated(1e-5, "relu")
    with record() as records:
        assert batch_norm.batch_norm_act(y, norm, None, None, how).shape == y.shape
        sums = batch_norm.batch_norm_act_sums(y, y, None, norm, None, None, how)
        dy, dresidual = batch_norm.batch_norm_act_gradient(y, y, None, norm, None, y, sums, 1.0, how, True)
    assert not records and not sums.any() and sums.shape == (3, 8)
    assert dy.shape == y.shape and dresidual is not None and dresidual.shape == y.shape


def test_operands_that_do_not_fit_are_named() -> None:
    y = torch.zeros(2, 8, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    ones, how = torch.ones(8, device=DEVICE), Activated(1e-5, "relu")
    norm = (ones,) * 4
    bad = {
        "running_mean": ((ones[:7], ones, ones, ones), None, None),
        "running_var": ((ones, ones[:7], ones, ones), None, None),
        "bn_weight": ((ones, ones, torch.ones(1, device=DEVICE), ones), None, None),
        "bn_bias": ((ones, ones, ones, ones.double()), None, None),
        "slope": (norm, ones[:1], None),
        r"residual.*\[2, 8, 1, 1\].*\[2, 8, 3, 3\]": (norm, None, y[..., :1, :1]),
        "residual.*float16.*float32": (norm, None, y.half()),
    }
    for match, (vectors, slope, residual) in bad.items():
        with record() as records, pytest.raises(RuntimeError, match=match):
            batch_norm.batch_norm_act(y, vectors, slope, residual, how)
        assert not records


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_a_split_reduction_ends_in_the_same_epilogue(transposed: bool, monkeypatch, set_fp32_precision) -> None:
    """Bias, statistics, batch norm, activation and residual after sums of several programs."""
    set_fp32_precision("ieee")  # which the gather serves
    x, weight = torch.randn(3, 20, 5, 4, generator=generator()), torch.randn(20, 20, 3, 3, generator=generator()) / 9
    bias, mean, beta = torch.randn(3, 20, generator=generator())
    var, gamma = torch.rand(2, 20, generator=generator()) + 0.5
    residual = torch.randn(3, 20, 5, 4, generator=generator())
    function, output_size = torch.conv2d, None
    padding = (1, 1, 1, 1)
    if transposed:
        function, output_size, padding = torch.conv_transpose2d, (5, 4), (1, 1)
    y = function(x.double(), weight.double(), bias.double(), padding=1)
    by_channel = [t.double().view(-1, 1, 1) for t in (mean, var, gamma, beta)]
    z = torch.relu((y - by_channel[0]) / (by_channel[1] + 1e-3).sqrt() * by_channel[2] + by_channel[3] + residual)
    ours = [t.to(DEVICE) for t in (x, weight, bias)]
    norm = tuple(t.to(DEVICE) for t in (mean, var, gamma, beta))
    convolution = output_size, (1, 1), padding, (1, 1), 1
    name_tile(monkeypatch, BLOCK_M=16, BLOCK_K=16, BLOCK_C=16, SPLITS=4)
    with record() as records:
        out = conv.conv_act(*ours, norm, None, residual.to(DEVICE), *convolution, 1e-3, "relu", 0.0, 0.0, False)
        raw, *found = conv.conv_statistics(*ours, *convolution)
    kernels = ["conv_gather_kernel", "conv_finish_kernel"]
    assert [r.name for r in records] == [*kernels, *kernels, "combine_statistics_kernel"]
    within(out, z, 1e-4, "the activation")
    within(raw, y, 1e-4, "the convolution")
    assert_statistics(*found, raw.cpu().double().transpose(0, 1).flatten(1).T, "the convolution")
