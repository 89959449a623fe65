"""fastconv.nn's pools against torch.nn's, and what convert, revert and report make of pools."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch

import fastconv
from fastconv import functional, nn
from fastconv.kernels.launch.interpreter import interpreting
from fastconv.kernels.launch.launch import record
from tests.marks import DEVICE, runs_kernels

pytestmark = runs_kernels
SHAPES = {"1": (2, 3, 9), "2": (2, 3, 9, 8), "3": (1, 3, 5, 6, 5)}
KINDS: dict[str, dict[str, Any]] = {
    "MaxPool": {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "ceil_mode": True, "return_indices": True},
    "AvgPool": {"kernel_size": 2, "padding": 1, "count_include_pad": False},
    "AdaptiveMaxPool": {"output_size": 4, "return_indices": True},
    "AdaptiveAvgPool": {"output_size": 3},
    "LPPool": {"norm_type": 2, "kernel_size": 2, "ceil_mode": True},
}
LAYERS = {f"{kind}{rank}d": arguments for rank in SHAPES for kind, arguments in KINDS.items()}
each_layer = pytest.mark.parametrize("name", LAYERS)


def layers(name: str) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """Ours, theirs, and an input."""
    arguments = dict(LAYERS[name])
    if name in ("AvgPool2d", "AvgPool3d"):
        arguments["divisor_override"] = 3
    x = torch.rand(SHAPES[name[-2]], generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return getattr(nn, name)(**arguments), getattr(torch.nn, name)(**arguments), x


@each_layer
def test_layers_are_pytorchs(name: str) -> None:
    ours, theirs, x = layers(name)
    with record() as records:
        found = ours(x)
    torch.testing.assert_close(found, theirs(x))
    assert records[0].name == "pool_kernel"
    assert repr(ours) == repr(theirs) and isinstance(ours, type(theirs)) and vars(ours).keys() == vars(theirs).keys()


@each_layer
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save, weights_only"])
def test_copies(name: str, how: str) -> None:
    ours, _, _ = layers(name)
    if how == "deepcopy":
        twin = copy.deepcopy(ours)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        twin = torch.load(file, weights_only=True)
    assert type(twin) is type(ours) and repr(twin) == repr(ours)


@each_layer
def test_convert_and_back(name: str) -> None:
    ours, theirs, _ = layers(name)
    plain = type(theirs)
    assert fastconv.convert(theirs) is theirs and type(theirs) is type(ours)
    (pool,) = fastconv.report(theirs).pools
    assert (pool.name, pool.kind, pool.reason) == ("", name, None)
    assert type(fastconv.revert(theirs)) is plain
    assert fastconv.report(theirs).pools[0].reason == "not converted"


@each_layer
def test_torch_fx_finds_one_call(name: str) -> None:
    ours, _, x = layers(name)
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(ours))
    function = name.replace("MaxPool", "max_pool").replace("AvgPool", "avg_pool").replace("LPPool", "lp_pool")
    function = function.replace("Adaptive", "adaptive_")
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert calls == [getattr(functional, function)]
    torch.testing.assert_close(traced(x), ours(x))


class Tagged(torch.nn.MaxPool2d):
    """A user's subclass."""


def model() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 8, 3), torch.nn.MaxPool2d(2), Tagged(2), torch.nn.AvgPool2d(1)),
        torch.nn.AdaptiveAvgPool2d(1),
    )


def test_report_lists_pools_beside_convolutions() -> None:
    report = fastconv.report(fastconv.convert(model()))
    assert (report.replaced, report.left) == (["0"], [])
    assert [(pool.name, pool.reason) for pool in report.pools] == [
        ("1", None),
        ("2", f"a class of its own: {__name__}.Tagged"),
        ("3", None),
        ("4", None),
    ]
    assert report.summary == "1 of 1 convolution layers and 3 of 4 pools on fastconv's kernels"
    assert "2      Tagged             PyTorch    a class of its own" in str(report)


def test_a_model_without_convolutions_is_summed_up_by_its_pools() -> None:
    model = fastconv.convert(torch.nn.Sequential(torch.nn.MaxPool2d(2), Tagged(2), torch.nn.BatchNorm2d(3)))
    report = fastconv.report(model)
    assert report.summary == "1 of 2 pools on fastconv's kernels" == str(report).splitlines()[-1]
    assert "MaxPool2d" in str(report)


def test_include_and_exclude() -> None:
    assert [type(layer) for layer in fastconv.convert(model(), exclude=torch.nn.MaxPool2d)] == [
        *(nn.Conv2d, torch.nn.MaxPool2d, Tagged, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
    ]
    assert [type(layer) for layer in fastconv.convert(model(), include=["1", "4"])] == [
        *(torch.nn.Conv2d, nn.MaxPool2d, Tagged, torch.nn.AvgPool2d, nn.AdaptiveAvgPool2d)
    ]


def test_what_is_left_has_its_reason() -> None:
    scripted = torch.jit.script(torch.nn.Sequential(torch.nn.MaxPool2d(2)))
    own = torch.nn.MaxPool2d(2)
    own.forward = lambda x: x
    reasons = [pool.reason for m in (scripted, own) for pool in fastconv.report(fastconv.convert(m)).pools]
    assert reasons == ["scripted", "a forward of its own"]


def test_a_network_trains_the_same() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 8, 3), torch.nn.MaxPool2d(3, 2, 1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)),
        *(torch.nn.Flatten(), torch.nn.Linear(8, 2)),
    ).to(DEVICE)
    converted = fastconv.convert(copy.deepcopy(plain), memory_format=torch.channels_last)
    x = torch.randn(2, 3, 9, 9, device=DEVICE)
    with record() as records, fastconv.settings(strict=True):
        converted(x).square().sum().backward()
    plain(x).square().sum().backward()
    tolerance = 1e-4 if interpreting() else 2e-2
    for ours, theirs in zip(converted.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)
    names = [r.name for r in records if "pool" in r.name]
    assert names == ["pool_kernel"] * 2 + ["pool_pixel_gradient_kernel", "pool_gradient_kernel"]
