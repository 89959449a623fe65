"""fastconv.functional's pools against torch.nn.functional's: results, gradients of two orders, formats, errors."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastconv.functional as ours
from fastconv import settings
from fastconv.autograd.pool import max_pool_op
from fastconv.kernels import dispatch
from fastconv.kernels.launch.launch import record
from fastconv.kernels.ops import call
from reference import assert_close, assert_equal
from tests.marks import DEVICE, runs_kernels

pytestmark = runs_kernels

# name -> (function, input, arguments)
CALLS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "max_pool1d": ("max_pool1d", (2, 3, 11), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "max_pool2d": ("max_pool2d", (2, 8, 7, 6), {"kernel_size": 3, "stride": (2, 1), "padding": 1, "ceil_mode": True}),
    "max_pool2d, dilated": ("max_pool2d", (2, 3, 7, 8), {"kernel_size": (2, 3), "stride": 1, "dilation": (3, 2)}),
    "max_pool2d unbatched": ("max_pool2d", (3, 6, 6), {"kernel_size": (2,)}),
    "max_pool3d": ("max_pool3d", (1, 3, 4, 5, 4), {"kernel_size": 2, "stride": (1, 2, 2)}),
    "avg_pool1d": ("avg_pool1d", (2, 3, 9), {"kernel_size": (4,), "padding": 2, "count_include_pad": False}),
    "avg_pool1d, ceil": ("avg_pool1d", (2, 3, 10), {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
    "avg_pool2d": ("avg_pool2d", (2, 8, 6, 7), {"kernel_size": 2, "stride": (2, 1), "padding": 1}),
    "avg_pool2d, divisor": ("avg_pool2d", (2, 3, 6, 7), {"kernel_size": 3, "divisor_override": 4}),
    "avg_pool2d, divisor below zero": ("avg_pool2d", (2, 3, 6, 7), {"kernel_size": 2, "divisor_override": -2}),
    "avg_pool2d unbatched": ("avg_pool2d", (3, 6, 6), {"kernel_size": 2}),
    "avg_pool3d": (
        "avg_pool3d",
        (1, 3, 5, 4, 5),
        {"kernel_size": 2, "stride": 2, "padding": (1, 0, 1), "ceil_mode": True, "count_include_pad": False},
    ),
    "adaptive_max_pool1d": ("adaptive_max_pool1d", (2, 3, 11), {"output_size": 4}),
    "adaptive_max_pool2d": ("adaptive_max_pool2d", (2, 8, 7, 9), {"output_size": (3, None)}),
    "adaptive_max_pool2d unbatched": ("adaptive_max_pool2d", (3, 7, 9), {"output_size": 1}),
    "adaptive_max_pool3d": ("adaptive_max_pool3d", (1, 3, 4, 5, 6), {"output_size": (2, 3, 4)}),
    "adaptive_avg_pool1d": ("adaptive_avg_pool1d", (2, 3, 11), {"output_size": (4,)}),
    "adaptive_avg_pool2d": ("adaptive_avg_pool2d", (2, 8, 7, 6), {"output_size": 1}),
    "adaptive_avg_pool2d, uneven": ("adaptive_avg_pool2d", (2, 3, 5, 7), {"output_size": (None, 3)}),
    "adaptive_avg_pool3d": ("adaptive_avg_pool3d", (1, 3, 4, 5, 3), {"output_size": (2, 2, 3)}),
    "lp_pool1d": ("lp_pool1d", (2, 3, 9), {"norm_type": 2, "kernel_size": 3}),
    "lp_pool2d": ("lp_pool2d", (2, 3, 7, 6), {"norm_type": 3.0, "kernel_size": (2, 3), "stride": 2, "ceil_mode": True}),
    "lp_pool2d, infinite": ("lp_pool2d", (2, 3, 6, 6), {"norm_type": float("inf"), "kernel_size": 2}),
    "lp_pool2d, infinite and negative": ("lp_pool2d", (2, 3, 6, 6), {"norm_type": -float("inf"), "kernel_size": 2}),
    "lp_pool2d, root": ("lp_pool2d", (2, 8, 6, 7), {"norm_type": 0.5, "kernel_size": 3, "stride": 1}),
    "lp_pool2d, unbatched": ("lp_pool2d", (3, 6, 6), {"norm_type": 1, "kernel_size": 2}),
    "lp_pool3d": ("lp_pool3d", (1, 3, 4, 5, 4), {"norm_type": 2.0, "kernel_size": 2}),
}
MAXIMA = [name for name in CALLS if "max" in name]
each_call = pytest.mark.parametrize("name", CALLS)


class NoFallback(TorchDispatchMode):
    """Raises on a call of one of PyTorch's own pools."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "pool" in func.name() and not func.name().startswith("fastconv::"):
            raise AssertionError(f"{func.name()} was called")
        return func(*args, **(kwargs or {}))


def leaf(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Positive numbers, as lp_pool wants them."""
    x = torch.rand(CALLS[name][1], generator=torch.Generator().manual_seed(0)) + 0.5
    return x.to(dtype).to(DEVICE).requires_grad_()


def gradients(module: Any, name: str, x: Tensor) -> tuple[Tensor, ...]:
    """The output, the gradient of its squares, and the gradient of that one's."""
    function, _, arguments = CALLS[name]
    y = getattr(module, function)(x, **arguments)
    (first,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first * first).sum(), x)
    return y, first, second


def against_theirs(name: str) -> None:
    x = leaf(name)
    references = gradients(theirs, name, x.detach().cpu().double().requires_grad_())
    for index, (value, reference) in enumerate(zip(gradients(ours, name, x), references, strict=True)):
        scale = reference.detach().abs().max().expand(reference.shape)
        assert_close(value, reference.detach(), scale, 256, f"tensor {index} of {name}")


@each_call
def test_forward_and_gradients_of_two_orders(name: str) -> None:
    with NoFallback(), settings(strict=True), record() as records:
        x = leaf(name)
        values = gradients(ours, name, x)
    references = gradients(theirs, name, x.detach().cpu().double().requires_grad_())
    for index, (value, reference) in enumerate(zip(values, references, strict=True)):
        scale = reference.detach().abs().max().expand(reference.shape)
        assert_close(value, reference.detach(), scale, 256, f"tensor {index} of {name}")
    # Forward, backward, and through both once more; PyTorch knows that a maximum's second derivative needs no forward.
    # An lp norm's backward computes it again.
    assert len(records) == (8 if "lp" in name and "infinite" not in name else 4)
    assert all(r.name.startswith("pool_") for r in records)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*[name for name in CALLS if "lp" not in name][::2], "lp_pool1d"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    function, _, arguments = CALLS[name]
    x = leaf(name, dtype)
    exact = x.detach().cpu().double().requires_grad_()
    y, reference = getattr(ours, function)(x, **arguments), getattr(theirs, function)(exact, **arguments)
    dy = torch.randn(y.shape).to(dtype)
    (dx,) = torch.autograd.grad(y, x, dy.to(DEVICE))
    (dx_reference,) = torch.autograd.grad(reference, exact, dy.double())
    assert y.dtype == dx.dtype == dtype
    assert_close(y, reference.detach(), reference.detach().abs(), 64, name)
    # Terms of either sign cancel: the bound is on their size.
    bound = torch.autograd.grad(getattr(theirs, function)(exact, **arguments), exact, dy.double().abs())[0]
    assert_close(dx, dx_reference, bound.abs(), 64, f"gradient of {name}")


@pytest.mark.parametrize("name", MAXIMA)
def test_indices_are_pytorchs(name: str) -> None:
    function, _, arguments = CALLS[name]
    x = leaf(name)
    y, indices = getattr(ours, function)(x, **arguments, return_indices=True)
    reference, expected = getattr(theirs, function)(x.cpu(), **arguments, return_indices=True)
    assert indices.dtype == torch.int64 and not indices.requires_grad and y.requires_grad
    assert_equal(y.detach(), reference.detach(), name)
    assert torch.equal(indices.cpu(), expected)
    if function == "max_pool3d" or name == "max_pool1d":
        unpool = getattr(theirs, function.replace("max_pool", "max_unpool"))
        sizes = [arguments.get(key, default) for key, default in (("kernel_size", 1), ("stride", None), ("padding", 0))]
        restored, expected = (
            unpool(*pair, *sizes, output_size=x.shape[-int(function[-2]) :]).cpu()
            for pair in ((y, indices), (reference.to(DEVICE), expected.to(DEVICE)))
        )
        assert torch.equal(restored, expected)


@pytest.mark.parametrize("name", [name for name in CALLS if "unbatched" not in name])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_memory_format_is_the_inputs(name: str, last: bool) -> None:
    function, shape, arguments = CALLS[name]
    order = (0, *range(2, len(shape)), 1)
    x = leaf(name).detach()
    if last:
        x = x.permute(order).contiguous().permute(0, len(shape) - 1, *range(1, len(shape) - 1))
    x.requires_grad_()
    y = getattr(ours, function)(x, **arguments)
    (dx,) = torch.autograd.grad(y.sum(), x)
    for t in (y, dx):
        if t[0, 0].numel() > 1:
            assert t.permute(order).is_contiguous() == last and t.is_contiguous() != last
    if not last:
        assert y.view(y.shape[0], -1).shape[0] == shape[0]


def test_only_taps_are_kept() -> None:
    """A byte an output is kept, neither the input nor int64 indices; nothing without gradients."""
    tensors: list[Tensor] = []
    x = torch.randn(2, 8, 6, 6, device=DEVICE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        ours.max_pool2d(x, 3, 2, 1)
        ours.adaptive_avg_pool2d(x, 3)
    assert [(t.dtype, t.shape) for t in tensors] == [(torch.uint8, (2, 8, 3, 3))]
    with torch.no_grad(), record() as records:
        assert not ours.max_pool2d(x, 3, 2, 1).requires_grad
    assert [len(r.launch.pointers) for r in records] == [3] and records[0].launch.pointers[2] is None


def test_signatures_are_pytorchs() -> None:
    for name in (name for name in ours.__all__ if "_pool" in name):
        kind = name.removesuffix(name[-2:])
        parameters = list(inspect.signature(getattr(ours, name)).parameters)
        if kind == "max_pool" or kind == "adaptive_max_pool":
            reference = list(inspect.signature(getattr(theirs, f"{name}_with_indices")).parameters)
        elif kind == "avg_pool":
            reference = ["input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"]
            reference += ["divisor_override"] * (name[-2] != "1")
        elif name == "adaptive_avg_pool1d":
            reference = ["input", "output_size"]
        else:
            reference = list(inspect.signature(getattr(theirs, name)).parameters)
        assert parameters == reference, name


def test_windows_of_nan_and_infinity() -> None:
    x = torch.full((1, 3, 4, 4), -torch.inf)
    x[0, 1] = torch.nan
    x[0, 2, :2, :2] = torch.tensor([[torch.nan, 1.0], [torch.nan, torch.inf]])
    for padding in (0, 1):
        (y, indices), (reference, expected) = (
            module.max_pool2d(x.to(device), 2, 2, padding, return_indices=True)
            for module, device in ((ours, DEVICE), (theirs, "cpu"))
        )
        torch.testing.assert_close(y.cpu(), reference, equal_nan=True, rtol=0, atol=0)
        assert torch.equal(indices.cpu(), expected)


def test_empty_batches() -> None:
    calls: tuple[tuple[str, tuple[int, ...]], ...] = (("max_pool2d", (2,)), ("avg_pool2d", (2,)))
    for function, arguments in (*calls, ("adaptive_max_pool2d", (3,)), ("lp_pool2d", (2, 2))):
        x = torch.zeros(0, 3, 6, 6, device=DEVICE, requires_grad=True)
        with record() as records:
            y = getattr(ours, function)(x, *arguments)
            (dx,) = torch.autograd.grad(y.sum(), x)
        assert y.shape == (0, 3, 3, 3) and dx.shape == x.shape and not records
    x = torch.ones(2, 3, 6, 6, device=DEVICE, requires_grad=True)
    y = ours.adaptive_avg_pool2d(x, (0, 2))
    assert y.shape == (2, 3, 0, 2) and not torch.autograd.grad(y.sum(), x)[0].any()


SHAPES = {1: (2, 4, 9), 2: (2, 4, 9, 9), 3: (2, 4, 5, 5, 5)}
# what -> arguments behind the input, of every rank
BAD_WINDOWS: dict[str, tuple[Any, ...]] = {
    "padding over half the window": (3, 1, 2),
    "negative padding": (3, 1, -1),
    "no window": (0,),
    "negative window": (-1,),
    "no stride": (2, 0),
    "negative stride": (2, -1),
    "window larger than the input": (20,),
    "four numbers": ((2, 2, 2, 2),),
    "four strides": (2, (1, 1, 1, 1)),
    "a fraction": (1.5,),
    "a word": ("same",),
    "a yes": (True,),
    "no padding at all": (2, 1, ()),
}
BAD_MAX: dict[str, tuple[Any, ...]] = {"no dilation": (2, 1, 0, 0), "negative dilation": (2, 1, 0, -1)}
BAD_MAX["padding over half, dilated"] = (2, 1, 2, 3)
BAD_AVERAGE: dict[str, tuple[Any, ...]] = {"divisor of zero": (2, 1, 0, False, True, 0)}
BAD_ADAPTIVE: dict[str, tuple[Any, ...]] = {"negative size": (-1,), "too many sizes": ((1, 1, 1, 1),)}
BAD_ADAPTIVE |= {"a fraction": (1.5,), "no size": ((),), "nothing": (None,), "a letter": ("a",), "a yes": (True,)}
BAD_NORMS = {"a word": (2, "same"), "no window": (2, 0), "no windows": (2, ()), "four numbers": (2, (2, 2, 2, 2))}
BAD_NORMS |= {"no norm": (0, 2), "no stride": (2, 2, 0), "window larger than the input": (2, 20)}
BAD = [
    (f"{kind}{rank}d", what, arguments)
    for rank in (1, 2, 3)
    for kind, cases in (
        ("max_pool", BAD_WINDOWS | BAD_MAX),
        ("avg_pool", BAD_WINDOWS | (BAD_AVERAGE if rank > 1 else {})),
        ("lp_pool", BAD_NORMS if rank == 1 else {what: case for what, case in BAD_NORMS.items() if what != "a word"}),
        ("adaptive_max_pool", BAD_ADAPTIVE),
        ("adaptive_avg_pool", BAD_ADAPTIVE),
    )
    for what, arguments in cases.items()
]


def raised(module: Any, function: str, x: Tensor, arguments: tuple[Any, ...]) -> Exception | None:
    try:
        getattr(module, function)(x, *arguments)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize(("function", "what", "arguments"), BAD, ids=[f"{f}: {what}" for f, what, _ in BAD])
def test_bad_arguments_raise_as_pytorch_does(function: str, what: str, arguments: tuple[Any, ...]) -> None:
    shape = SHAPES[int(function[-2])]
    expected = raised(theirs, function, torch.zeros(shape), arguments)
    with record() as records:
        error = raised(ours, function, torch.zeros(shape, device=DEVICE), arguments)
    assert expected is not None and type(error) is type(expected), (error, expected)
    assert not records
    if isinstance(error, RuntimeError):
        assert str(list(shape)) in str(error) or any(
            str(list(a)) in str(error) for a in arguments if isinstance(a, tuple)
        )


INPUTS = {
    "no batch and no channels": lambda x: x[0, 0],
    "one axis too many": lambda x: x[None],
    "no channels": lambda x: x[:, :0],
    "no pixels": lambda x: x[..., :0],
    "no channels, unbatched": lambda x: x[0][:0],
}


@pytest.mark.parametrize("what", INPUTS)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", ["max_pool", "avg_pool", "lp_pool", "adaptive_max_pool", "adaptive_avg_pool"])
def test_bad_inputs_raise_as_pytorch_does(kind: str, rank: int, what: str) -> None:
    x = INPUTS[what](torch.zeros(SHAPES[rank]))
    arguments = (2, 2) if kind == "lp_pool" else (2,)
    expected = raised(theirs, f"{kind}{rank}d", x, arguments)
    error = raised(ours, f"{kind}{rank}d", x.to(DEVICE), arguments)
    assert type(error) is type(expected), (error, expected)
    if error is not None:
        assert str(list(x.shape)) in str(error)


def test_norms_that_are_none() -> None:
    x = torch.rand(2, 3, 6, 6, device=DEVICE)
    assert type(raised(ours, "lp_pool2d", x, (0.0, 2))) is ZeroDivisionError
    # One that is learnt is PyTorch's.
    norm = torch.tensor(3.0, device=DEVICE, requires_grad=True)
    with record() as records:
        (gradient,) = torch.autograd.grad(ours.lp_pool2d(x, norm, 2).sum(), norm)
    assert not records and gradient != 0


@pytest.mark.parametrize(
    "name", ["max_pool1d", "avg_pool2d", "lp_pool3d", "adaptive_avg_pool2d", "adaptive_max_pool3d"]
)
def test_other_integers_are_integers(name: str) -> None:
    """NumPy's, tensors of one, and what else may stand for an index."""
    numpy = pytest.importorskip("numpy")
    x = torch.rand(SHAPES[int(name[-2])], device=DEVICE)
    norm = (2,) if "lp" in name else ()
    expected = getattr(ours, name)(x, *norm, 2)
    sizes = [numpy.int64(2), torch.tensor(2)] if "adaptive" not in name else [numpy.array([2] * int(name[-2]))]
    for size in (*sizes, (numpy.int32(2),) * int(name[-2])):
        assert torch.equal(getattr(ours, name)(x, *norm, size), expected)


def test_a_volume_smaller_than_the_window_is_no_average() -> None:
    """Whatever the padding, as PyTorch has it."""
    x = torch.zeros(1, 2, 3, 9, 9)
    for module, device in ((ours, DEVICE), (theirs, "cpu")):
        assert type(raised(module, "avg_pool3d", x.to(device), (4, 1, 2))) is RuntimeError
        assert raised(module, "max_pool3d", x.to(device), (4, 1, 2)) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32], ids=str)
def test_other_dtypes_are_pytorchs(dtype: torch.dtype) -> None:
    x = torch.arange(32).view(1, 2, 4, 4).to(dtype).to(DEVICE)
    for function, arguments in (("max_pool2d", (2,)), ("avg_pool2d", (2,)), ("adaptive_avg_pool2d", (2,))):
        expected, error = raised(theirs, function, x, arguments), raised(ours, function, x, arguments)
        assert type(error) is type(expected)
        if error is None:
            with record() as records, settings(strict=True):
                y = getattr(ours, function)(x, *arguments)
            assert not records and torch.equal(y, getattr(theirs, function)(x, *arguments))


@pytest.fixture
def nothing_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    for direction in ("forward", "backward"):
        monkeypatch.setitem(dispatch.FAMILIES, direction, ())
    monkeypatch.setattr(call, "_calls", {})


@pytest.mark.usefixtures("nothing_covered")
@each_call
def test_pytorch_takes_over_where_no_kernel_does(name: str) -> None:
    with record() as records:
        against_theirs(name)
    assert not records
    function, _, arguments = CALLS[name]
    if name in MAXIMA:
        x = leaf(name)
        (y, indices), (reference, expected) = (
            getattr(module, function)(x, **arguments, return_indices=True) for module in (ours, theirs)
        )
        assert torch.equal(y, reference) and torch.equal(indices, expected)
    with settings(strict=True), pytest.raises(RuntimeError, match="has no kernel for this call"):
        getattr(ours, function)(leaf(name), **arguments)


@pytest.mark.parametrize(
    "name", ["max_pool2d", "avg_pool3d", "adaptive_max_pool1d", "adaptive_avg_pool2d, uneven", "lp_pool2d"]
)
def test_compiles_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    function, _, arguments = CALLS[name]

    def run(x: Tensor) -> Any:
        extra = {"return_indices": True} if name in MAXIMA else {}
        return getattr(ours, function)(x, **arguments, **extra)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for grown in (0, 2):
        x = leaf(name).detach()
        x = torch.cat([x] + [x[..., :1]] * grown, dim=-1).requires_grad_()
        results = [out if isinstance(out, tuple) else (out,) for out in (compiled(x), run(x))]
        assert all(map(torch.equal, *results)) and results[0][0].stride() == results[1][0].stride()
        gradients = [torch.autograd.grad(out[0].square().sum(), x)[0] for out in results]
        assert torch.equal(*gradients)
    torch._dynamo.reset()


def samples() -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator with arguments of a call, in either format."""
    x = torch.randn(2, 3, 6, 5, device=DEVICE)
    last = x.contiguous(memory_format=torch.channels_last)
    geometry, shares = ([3, 2], [2, 1], [1, 0], [1, 1]), ([], [], [], [])
    y, taps = max_pool_op(last, [3, 4], *geometry, True)
    average = ([3, 2], [2, 1], [1, 0], False, 0)
    return [
        ("max_pool", (x, [3, 4], *geometry, True)),
        ("max_pool", (last, [3, 4], *geometry, False)),
        ("max_pool", (x, [4, 2], *shares, True)),
        ("max_pool_backward", (y, taps, [6, 5], *geometry, True)),
        ("max_pool_gather", (taps, x, *geometry, True)),
        ("max_pool_indices", (taps, [6, 5], *geometry, True)),
        ("average_pool", (x, [3, 4], *average)),
        ("average_pool", (last, [4, 2], [], [], [], True, 0)),
        ("average_pool_backward", (y, [6, 5], *average, True)),
        ("average_pool_backward", (y, [6, 5], [], [], [], True, 0, False)),
        ("lp_pool", (last, [3, 2], [2, 2], [2, 2], 2.0)),
        ("lp_pool_backward", (y[..., :2], y[..., :2], x, [2, 2], [2, 2], 3.0, False)),
    ]


@pytest.mark.parametrize("index", range(12))
def test_operators_are_what_they_say(index: int) -> None:
    name, arguments = samples()[index]
    torch.library.opcheck(getattr(torch.ops.fastconv, name).default, arguments)


def test_traced_by_fx_as_one_call() -> None:
    class Pools(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ours.lp_pool2d(ours.adaptive_avg_pool2d(ours.max_pool2d(x, 3), 2), 2.0, 2)

    graph = torch.fx.symbolic_trace(Pools()).graph
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert called == [ours.max_pool2d, ours.adaptive_avg_pool2d, ours.lp_pool2d]
