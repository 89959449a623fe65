"""Arguments of every function against PyTorch's: what it takes is taken, what it refuses raises the same type."""

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as theirs
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastconv.functional as ours
from tests.marks import DEVICE, runs_kernels

pytestmark = runs_kernels


class Index:
    def __index__(self) -> int:
        return 2


# What may stand for one integer. PyTorch takes the first eight.
INTEGERS: dict[str, Any] = {
    "int": 2,
    "numpy.int64": numpy.int64(2),
    "numpy.uint8": numpy.uint8(2),
    "an array of one": numpy.array(2),
    "a tensor": torch.tensor(2),
    "an index": Index(),
    "zero": 0,
    "a negative number": -1,
    "a bool": True,
    "float": 2.0,
    "numpy.float32": numpy.float32(2),
    "a word": "a",
    "an array": numpy.array([2, 2]),
    "a dict": {2: 2},
}
# In place of several, by their number.
SEVERAL: dict[str, Callable[[int], Any]] = {
    "a list": lambda rank: [2] * rank,
    "torch.Size": lambda rank: torch.Size([2] * rank),
    "NumPy's": lambda rank: (numpy.int32(2),) * rank,
    "tensors": lambda rank: [torch.tensor(2)] * rank,
    "one of many": lambda rank: (2,),
    "none": lambda rank: (),
    "too many": lambda rank: (2,) * (rank + 1),
    "bools": lambda rank: [True] * rank,
    "floats": lambda rank: (2.0,) * rank,
    "nested": lambda rank: ((2,) * rank,),
    "a range": lambda rank: range(2, 2 + rank),
}
BOOLS: dict[str, Any] = {"a bool": True, "numpy.bool": numpy.bool_(True), "int": 1, "nothing": None}
# Without data: nothing is launched.
FAKE = FakeTensorMode()
SPATIAL = {1: (9,), 2: (9, 8), 3: (5, 6, 5)}


def result(module: Any, function: str, operands: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
    """The type of the exception, or the shape."""
    try:
        y = getattr(module, function)(*operands, **arguments)
    except Exception as error:
        return type(error)
    return tuple((y[0] if isinstance(y, tuple) else y).shape)


def check(function: str, operands: tuple[Any, ...], arguments: dict[str, Any], what: str) -> None:
    expected = result(theirs, function, operands, arguments)
    found = result(ours, function, tuple(FAKE.from_tensor(t.to(DEVICE)) for t in operands), arguments)
    assert found == expected, f"{function}, {what}"


def values(rank: int, single: bool = False) -> dict[str, Any]:
    # PyTorch itself takes these for one integer, and fails by an assertion if it expects several.
    lenient = ("an array of one",) if single else ("an index", "an array of one")
    found = {name: value for name, value in INTEGERS.items() if name not in lenient}
    return found if single else found | {name: make(rank) for name, make in SEVERAL.items()}


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", ["conv", "conv_transpose"])
def test_integers_of_convolutions(kind: str, rank: int) -> None:
    function = f"{kind}{rank}d"
    transposed = kind == "conv_transpose"
    shape = (2, 4, *(5,) * rank)
    operands = (
        torch.ones(shape),
        torch.ones(4, 4 if transposed else 2, *(2,) * rank),
        torch.ones(8 if transposed else 4),
    )
    for name in ("stride", "padding", "dilation", "groups", *["output_padding"] * transposed):
        for what, value in values(rank, name == "groups").items():
            arguments = {"groups": 2} | ({"stride": 3} if name == "output_padding" else {}) | {name: value}
            check(function, operands, arguments, f"{name}: {what}")


WINDOWS = {
    "max_pool": ("kernel_size", "stride", "padding", "dilation"),
    "avg_pool": ("kernel_size", "stride", "padding"),
    "lp_pool": ("stride",),
}


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", WINDOWS)
def test_integers_of_pools(kind: str, rank: int) -> None:
    operands = (torch.rand(2, 3, *SPATIAL[rank]),)
    least = {"norm_type": 2} if kind == "lp_pool" else {}
    for name in WINDOWS[kind]:
        for what, value in values(rank).items():
            size = {"kernel_size": 4 if name == "padding" else 2}
            check(f"{kind}{rank}d", operands, least | size | {name: value}, f"{name}: {what}")
    if kind == "avg_pool" and rank > 1:
        for what, value in values(rank, single=True).items():
            if what != "an index":
                check(f"{kind}{rank}d", operands, {"kernel_size": 2, "divisor_override": value}, f"divisor: {what}")
    for name in ("ceil_mode", *["count_include_pad"] * (kind == "avg_pool")):
        for what, value in BOOLS.items():
            check(f"{kind}{rank}d", operands, least | {"kernel_size": 2, name: value}, f"{name}: {what}")


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("kind", ["adaptive_max_pool", "adaptive_avg_pool"])
def test_sizes_of_adaptive_pools(kind: str, rank: int) -> None:
    x = torch.rand(2, 3, *SPATIAL[rank])
    sizes: dict[str, Any] = {
        "a size": 2,
        "None": None,
        "None among others": (None, *(2,) * (rank - 1)),
        "nothing but None": (None,) * rank,
        "a list": [2] * rank,
        "torch.Size": torch.Size([2] * rank),
        "a float": 2.0,
        "a bool": True,
        "one of many": (2,),
        "negative": (-1,) * rank,
        "zero": 0,
    }
    for what, size in sizes.items():
        check(f"{kind}{rank}d", (x,), {"output_size": size}, what)
    for axes in range(rank + 2):
        few = torch.rand((3,) * axes)
        check(f"{kind}{rank}d", (few,), {"output_size": (2,) * rank}, f"an input of {axes} axes, sizes")
        check(f"{kind}{rank}d", (few,), {"output_size": 2}, f"an input of {axes} axes, a size")


def test_norms() -> None:
    x = torch.rand(2, 3, 9, 8)
    for norm in (3, 2.5, numpy.float32(2), True, "a", None, (2,), 0, -1.0, float("nan")):
        check("lp_pool2d", (x,), {"norm_type": norm, "kernel_size": 2}, f"norm {norm!r}")
    for window in ((2,), (2, 2), [2, 3], (), (2, 2, 2)):
        check("lp_pool2d", (x,), {"norm_type": 2, "kernel_size": window}, f"window {window}")


@pytest.mark.parametrize("bias", [3, [1.0] * 4, numpy.zeros(4)], ids=["a number", "a list", "an array"])
def test_a_bias_that_is_no_tensor(bias: Any) -> None:
    for function in ("conv2d", "conv_transpose2d"):
        with pytest.raises(TypeError, match="expected a Tensor"):
            getattr(ours, function)(torch.ones(2, 4, 5, 5, device=DEVICE), torch.ones(4, 4, 2, 2, device=DEVICE), bias)


def test_layers_with_integers_of_numpy() -> None:
    """A layer keeps what it was made with."""
    import fastconv

    two = numpy.int64(2)
    made = nn.Sequential(
        nn.Conv2d(4, 6, two, stride=two, padding=two, dilation=two, groups=two),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, two, stride=two, groups=two, output_padding=numpy.int64(1)),
        nn.AvgPool2d(two, divisor_override=two),
        nn.AdaptiveAvgPool2d((two, None)),
    ).to(DEVICE)
    x = torch.rand(2, 4, 9, 8, device=DEVICE)
    with torch.no_grad():
        expected = made(x)
        made[1].reset_running_stats()
        torch.testing.assert_close(fastconv.convert(made)(x), expected)


NORM: dict[str, tuple[bool, dict[str, Any]]] = {
    "eps of 0": (True, {"eps": 0}),
    "eps of 0 in evaluation": (False, {"eps": 0.0}),
    "a negative eps": (True, {"eps": -1e-5}),
    "a negative eps in evaluation": (False, {"eps": -1e-5}),
    "eps that is no number": (True, {"eps": None}),
    "a word for eps": (False, {"eps": "a"}),
    "NumPy's eps": (True, {"eps": numpy.float32(0.1)}),
    "a tensor for eps": (False, {"eps": torch.tensor(0.1)}),
    "an integer for eps": (True, {"eps": 1}),
    "no momentum": (True, {"momentum": None}),
    "no momentum in evaluation": (False, {"momentum": None}),
    "NumPy's momentum": (True, {"momentum": numpy.float64(0.3)}),
    "an integer for momentum": (True, {"momentum": 1}),
    "a mean alone": (True, {"running_var": None}),
    "a variance alone": (True, {"running_mean": None}),
    "a variance alone in evaluation": (False, {"running_mean": None}),
    "no statistics": (True, {"running_mean": None, "running_var": None}),
    "no statistics in evaluation": (False, {"running_mean": None, "running_var": None}),
    "a mean of another size": (True, {"running_mean": torch.zeros(5)}),
    "a weight of another size": (False, {"bn_weight": torch.zeros(5)}),
    "a number for a mean": (True, {"running_mean": 3}),
    "a number for a weight": (False, {"bn_weight": 3}),
    "one value of each channel": (True, {"input": torch.ones(1, 4, 3, 3)}),
    "no image": (True, {"input": torch.ones(0, 4, 3, 3)}),
    "no channels": (True, {"input": torch.ones(2, 0, 3, 3)}),
    "no pixels": (False, {"input": torch.ones(2, 4, 0, 3)}),
    "groups of NumPy": (True, {"groups": numpy.int64(2), "weight": torch.ones(6, 2, 3, 3)}),
    "groups of a bool": (True, {"groups": True}),
    "a padding by name": (True, {"padding": "same"}),
    "an unknown padding": (False, {"padding": "full"}),
    "stride of a float": (False, {"stride": 1.5}),
    "a residual in a list": (True, {"residual": [1.0]}),
}


def plain(input: Tensor, weight: Tensor, training: bool, **it: Any) -> Tensor:
    convolution = {name: it[name] for name in ("padding", "groups", "stride") if name in it}
    y = theirs.conv2d(input, weight, None, **convolution)
    norm = it["running_mean"], it["running_var"], it["bn_weight"], it["bn_bias"]
    z = theirs.batch_norm(y, *norm, training, it["momentum"], it["eps"])
    return torch.relu(z if it["residual"] is None else z + it["residual"])


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("name", NORM)
def test_arguments_of_batch_norm(name: str, grad: bool) -> None:
    training, changes = NORM[name]
    results, statistics = [], []
    for function in (plain, lambda **it: ours.conv2d_bn_act(bias=None, **it)):
        torch.manual_seed(0)
        arguments: dict[str, Any] = {
            **{"input": torch.rand(2, 4, 3, 3), "weight": torch.ones(6, 4, 3, 3), "momentum": 0.1, "eps": 1e-3},
            **{"bn_weight": torch.ones(6), "bn_bias": torch.zeros(6), "residual": None, "training": training},
            **{"running_mean": torch.zeros(6), "running_var": torch.ones(6)},
        }
        arguments |= changes
        arguments = {k: v.clone().to(DEVICE) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        arguments["weight"].requires_grad_(grad)
        try:
            results.append(function(**arguments))
        except Exception as error:
            results.append(type(error))
        statistics.append((arguments["running_mean"], arguments["running_var"]))
    expected, found = results
    if isinstance(expected, type):
        assert found is expected
    else:
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*statistics)
