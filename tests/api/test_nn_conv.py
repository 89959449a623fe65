"""fastconv.nn's convolution layers against torch.nn's: numbers, state, copies, laziness, torch.fx."""

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from convolutions import products_of
from fastconv import nn
from fastconv.kernels.launch.launch import record
from reference import assert_equal, integers
from tests.marks import DEVICE, runs_kernels

pytestmark = runs_kernels

# name -> (class, arguments, input, forward's further arguments)
LAYERS: dict[str, tuple[str, dict[str, Any], tuple[int, ...], dict[str, Any]]] = {
    "Conv1d": ("Conv1d", {"kernel_size": 3, "stride": 2, "padding": 1}, (2, 4, 9), {}),
    "Conv1d same reflect": (
        "Conv1d",
        {"kernel_size": 4, "padding": "same", "padding_mode": "reflect", "dilation": 2},
        (2, 4, 9),
        {},
    ),
    "Conv2d": (
        "Conv2d",
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
        (2, 4, 7, 6),
        {},
    ),
    "Conv2d grouped without bias": ("Conv2d", {"kernel_size": 3, "groups": 2, "bias": False}, (2, 4, 5, 6), {}),
    "Conv2d unbatched": ("Conv2d", {"kernel_size": 3}, (4, 5, 6), {}),
    "Conv2d valid": ("Conv2d", {"kernel_size": 3, "padding": "valid"}, (1, 4, 5, 6), {}),
    "Conv2d uneven same": ("Conv2d", {"kernel_size": (2, 4), "padding": "same"}, (1, 4, 5, 6), {}),
    "Conv2d reflect": ("Conv2d", {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"}, (2, 4, 5, 6), {}),
    "Conv2d replicate": (
        "Conv2d",
        {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate"},
        (2, 4, 5, 6),
        {},
    ),
    "Conv2d circular": ("Conv2d", {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"}, (2, 4, 5, 6), {}),
    "Conv2d uneven same circular": (
        "Conv2d",
        {"kernel_size": (2, 4), "padding": "same", "padding_mode": "circular"},
        (1, 4, 5, 6),
        {},
    ),
    "Conv3d": ("Conv3d", {"kernel_size": (2, 3, 2), "stride": (1, 2, 1), "padding": 1}, (1, 4, 3, 5, 4), {}),
    "Conv3d replicate": ("Conv3d", {"kernel_size": 2, "padding": 1, "padding_mode": "replicate"}, (1, 4, 2, 3, 4), {}),
    "ConvTranspose1d": ("ConvTranspose1d", {"kernel_size": 3, "stride": 3, "output_padding": 1}, (2, 4, 5), {}),
    "ConvTranspose1d output_size": (
        "ConvTranspose1d",
        {"kernel_size": 3, "stride": 2},
        (2, 4, 5),
        {"output_size": [12]},
    ),
    "ConvTranspose2d": (
        "ConvTranspose2d",
        {
            "kernel_size": (3, 2),
            "stride": (2, 3),
            "padding": 1,
            "output_padding": (1, 2),
            "groups": 2,
            "dilation": (2, 1),
        },
        (2, 4, 3, 4),
        {},
    ),
    "ConvTranspose2d output_size": (
        "ConvTranspose2d",
        {"kernel_size": 3, "stride": 2, "padding": 1},
        (2, 4, 3, 4),
        {"output_size": [2, 6, 6, 7]},
    ),
    "ConvTranspose2d unbatched output_size": (
        "ConvTranspose2d",
        {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2},
        (4, 3, 4),
        {"output_size": (8, 9)},
    ),
    "ConvTranspose3d": ("ConvTranspose3d", {"kernel_size": 2, "stride": 2, "bias": False}, (1, 4, 2, 3, 2), {}),
    "ConvTranspose3d output_size": (
        "ConvTranspose3d",
        {"kernel_size": 2, "stride": 2},
        (1, 4, 2, 3, 2),
        {"output_size": (5, 6, 5)},
    ),
}
CLASSES = [name for name in nn.__all__ if hasattr(torch.nn, name)]


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, torch.nn.Module, Tensor]:
    """Our layer, torch's in fp64 with the same integer-valued parameters, and an input for ours."""
    cls, arguments, shape, _ = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    theirs = getattr(torch.nn, cls)(4, 6, **arguments).double()
    for parameter in theirs.parameters():
        parameter.data = integers(tuple(parameter.shape), 8, generator)
    ours = getattr(nn, cls)(4, 6, **arguments).to(DEVICE, dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, integers(shape, 8, generator).to(DEVICE, dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_gradients(name: str) -> None:
    keywords = LAYERS[name][3]
    ours, theirs, x = pair(name)
    x.requires_grad_()
    x64 = x.detach().cpu().double().requires_grad_()
    expected = theirs(x64, **keywords)
    dy = integers(tuple(expected.shape), 4, torch.Generator().manual_seed(1))
    expected.backward(dy)
    with record() as launches:
        y = ours(x, **keywords)
    assert products_of(launches) == ["conv_gather_kernel"]
    y.backward(dy.to(y))
    assert_equal(y.detach(), expected.detach(), "y")
    assert_equal(x.grad, x64.grad, "dx")
    for (what, parameter), reference in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_equal(parameter.grad, reference.grad, f"d{what}")


@pytest.mark.parametrize("name", LAYERS)
def test_repr_and_state(name: str) -> None:
    cls, arguments, _, _ = LAYERS[name]
    torch.manual_seed(3)
    theirs = getattr(torch.nn, cls)(4, 6, **arguments)
    torch.manual_seed(3)
    ours = getattr(nn, cls)(4, 6, **arguments)
    assert isinstance(ours, getattr(torch.nn, cls))
    assert repr(ours) == repr(theirs)
    assert vars(ours).keys() == vars(theirs).keys()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for ours_value, value in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(ours_value, value)
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("cls", CLASSES)
def test_constructor_is_torchs(cls: str) -> None:
    ours, theirs = getattr(nn, cls), getattr(torch.nn, cls)
    assert inspect.signature(ours) == inspect.signature(theirs)
    forward = inspect.signature(ours.forward), inspect.signature(theirs.forward)
    assert list(forward[0].parameters) == list(forward[1].parameters)


@pytest.mark.parametrize(
    "arguments",
    [
        {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "groups": 2},
        {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 0},
        {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": "full"},
        {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": "same", "stride": 2},
        {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding_mode": "mirror"},
    ],
    ids=lambda arguments: str({k: v for k, v in arguments.items() if k not in ("out_channels", "kernel_size")}),
)
def test_bad_constructor_arguments_raise_as_torchs_do(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as theirs:
        torch.nn.Conv2d(**arguments)
    with pytest.raises(ValueError) as ours:
        nn.Conv2d(**arguments)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("output_size", [(4, 7), (6,), (6, 9), (2, 4, 4, 6, 7)], ids=str)
def test_bad_output_size_raises_as_torchs_does(output_size: tuple[int, ...]) -> None:
    ours, theirs, x = pair("ConvTranspose2d output_size")
    with pytest.raises(ValueError) as expected:
        theirs(x.double().cpu(), output_size=output_size)
    with pytest.raises(ValueError) as error, record() as launches:
        ours(x, output_size=output_size)
    assert str(error.value) == str(expected.value)
    assert not launches


def test_wrong_channels_raise_as_torchs_do() -> None:
    ours, theirs, x = pair("Conv2d")
    with pytest.raises(RuntimeError):
        theirs(x.double().cpu()[:, :3])
    with pytest.raises(RuntimeError, match=r"\[2, 3, 7, 6\].*4 channels"), record() as launches:
        ours(x[:, :3])
    assert not launches


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "torch.save, weights_only"])
def test_copies(name: str, how: str) -> None:
    ours, _, x = pair(name)
    if how == "deepcopy":
        twin = copy.deepcopy(ours)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        twin = torch.load(file, weights_only="weights_only" in how)
    assert type(twin) is type(ours)
    assert torch.equal(twin(x), ours(x))
    assert twin.weight.data_ptr() != ours.weight.data_ptr()


@pytest.mark.parametrize("name", [name for name in LAYERS if " " not in name])
def test_lazy(name: str) -> None:
    cls, arguments, shape, _ = LAYERS[name]
    lazy = getattr(nn, f"Lazy{cls}")(6, **arguments).to(DEVICE)
    assert isinstance(lazy, getattr(torch.nn, f"Lazy{cls}"))
    assert repr(lazy) == repr(getattr(torch.nn, f"Lazy{cls}")(6, **arguments))
    copied = copy.deepcopy(lazy)
    x = torch.randn(shape, device=DEVICE)
    with record() as launches:
        y = lazy(x)
    assert len(products_of(launches)) == 1
    assert type(lazy) is getattr(nn, cls)
    assert repr(lazy) == repr(getattr(torch.nn, cls)(4, 6, **arguments))
    # A state_dict gives a lazy layer its sizes too.
    copied.load_state_dict(lazy.state_dict())
    assert torch.equal(copied(x), y)


@pytest.mark.parametrize("name", LAYERS)
def test_fx_traces_to_one_call(name: str) -> None:
    keywords = LAYERS[name][3]
    ours, _, x = pair(name)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = ours

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, **keywords)

    traced = torch.fx.symbolic_trace(Model())
    called = [node.target for node in traced.graph.nodes if node.op.startswith("call")]
    assert sum(getattr(target, "__module__", "").startswith("fastconv.") for target in called) == 1
    assert all(target is torch.nn.functional.pad or target.__module__.startswith("fastconv.") for target in called)
    assert torch.equal(traced(x), ours(x, **keywords))


def test_fx_traces_an_output_size_that_depends_on_the_input() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1, device=DEVICE)
            self.up = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, device=DEVICE)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x), output_size=x.shape[-2:])

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    for size in ((6, 7), (9, 4)):
        x = torch.randn(1, 4, *size, device=DEVICE)
        assert traced(x).shape == x.shape
        assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d circular", "Conv3d", "ConvTranspose2d output_size"])
def test_autocast(name: str) -> None:
    keywords = LAYERS[name][3]
    ours, theirs, x = pair(name)
    with torch.autocast(DEVICE, torch.bfloat16), record() as launches:
        y = ours(x, **keywords)
    assert y.dtype is torch.bfloat16
    assert launches[0].dtypes[:2] == (torch.bfloat16, torch.bfloat16)
    assert_equal(y.detach(), theirs(x.cpu().double(), **keywords).detach(), "y")
    y.float().sum().backward()
    assert ours.weight.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_other_dtypes_are_pytorchs(dtype: torch.dtype) -> None:
    ours = nn.Conv2d(4, 6, 3, device=DEVICE, dtype=dtype)
    x = torch.randn(1, 4, 5, 5, device=DEVICE, dtype=dtype)
    with record() as launches:
        y = ours(x)
    assert not launches
    assert torch.equal(y, torch.nn.functional.conv2d(x, ours.weight, ours.bias))


def test_a_subclass_with_a_weight_of_its_own() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, 2 * self.weight, None)

    ours, theirs, x = pair("Conv2d circular")
    ours.__class__ = Doubled
    with record() as launches:
        y = ours(x)
    assert len(products_of(launches)) == 1
    theirs.bias = None
    assert_equal(y.detach(), 2 * theirs(x.cpu().double()).detach(), "y")


def test_weights_changed_after_construction_are_used() -> None:
    ours, theirs, x = pair("Conv2d")
    ours.stride, theirs.stride = (1, 1), (1, 1)
    ours.weight.data.mul_(2)
    theirs.weight.data.mul_(2)
    assert_equal(ours(x).detach(), theirs(x.cpu().double()).detach(), "y")
