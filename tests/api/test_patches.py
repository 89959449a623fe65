"""What users replace on torch.nn's classes and in torch.nn.functional: a converted model runs it, as PyTorch would."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastconv
from convolutions import products_of
from fastconv import nn
from fastconv.activations import _FORMS
from fastconv.kernels.launch.device import here
from fastconv.kernels.launch.launch import record
from fastconv.nn import patches
from fastconv.nn.fused_call import _FUNCTIONS, NORMS, SKIPPED
from tests.marks import DEVICE, runs_kernels

pytestmark = runs_kernels
POOLS = [name for name in nn.__all__ if "Pool" in name]
F = torch.nn.functional


def layers(*extra: torch.nn.Module) -> torch.nn.Sequential:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        *(torch.nn.ConvTranspose2d(4, 2, 2), *extra),
    )
    return model.to(DEVICE).eval()


# Tests are collected without a GPU and without the interpreter too, and none runs.
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE if here.is_available() else "cpu")


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def plus_one(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A patch of the usual kind: it calls what it takes the place of."""

    @functools.wraps(theirs)
    def patch(*args: Any, **kwargs: Any) -> Any:
        return theirs(*args, **kwargs) + 1

    return patch


# owner, attribute, what a report says of the layer or the batch norm that is affected
PATCHES: dict[str, tuple[Any, str, str]] = {
    "Conv2d.forward": (torch.nn.Conv2d, "forward", "0"),
    "Conv2d._conv_forward": (torch.nn.Conv2d, "_conv_forward", "0"),
    "Conv2d.__call__": (torch.nn.Conv2d, "__call__", "0"),
    "ConvTranspose2d.forward": (torch.nn.ConvTranspose2d, "forward", "4"),
    "BatchNorm2d.forward": (torch.nn.BatchNorm2d, "forward", "1"),
    "_BatchNorm.forward": (torch.nn.modules.batchnorm._BatchNorm, "forward", "1"),
    "ReLU.forward": (torch.nn.ReLU, "forward", "1"),
    "ReLU._call_impl": (torch.nn.ReLU, "_call_impl", "1"),
    "MaxPool2d.forward": (torch.nn.MaxPool2d, "forward", "3"),
    "functional.conv2d": (F, "conv2d", "0"),
    "functional.conv_transpose2d": (F, "conv_transpose2d", "4"),
    "functional.batch_norm": (F, "batch_norm", "1"),
    "functional.relu": (F, "relu", "1"),
    "functional.max_pool2d": (F, "max_pool2d", "3"),
    "torch.relu": (torch, "relu", "1"),
    "torch.max_pool2d": (torch, "max_pool2d", "3"),
    "Module.__call__": (torch.nn.Module, "__call__", "0"),
    "Module._call_impl": (torch.nn.Module, "_call_impl", "0"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_is_run_and_taken_back(name: str, when: str, monkeypatch) -> None:
    owner, attribute, affected = PATCHES[name]
    model = layers()
    plain = copy.deepcopy(model)
    # Nothing of torch is known from before, as if it was patched before fastconv was imported.
    monkeypatch.setattr(patches, "_calls", {})
    monkeypatch.setattr(patches, "_beneath", {})
    with torch.no_grad(), monkeypatch.context() as patching:
        if when == "after":
            fastconv.convert(model)
            model(X)
        patching.setattr(owner, attribute, plus_one(getattr(owner, attribute)))
        if when == "before":
            fastconv.convert(model)
        close(model(X), plain(X))
        report = fastconv.report(model)
        found = {each.name: each.reason for each in (*report.norms, *report.layers, *report.pools)}
        assert found[affected] == f"{name if name.startswith('torch.') else f'torch.nn.{name}'} is patched"
    if (name, when) == ("Conv2d.__call__", "before"):
        fastconv.convert(model)  # the patch kept convert from seeing a call of a convolution
    with torch.no_grad(), record() as launches:
        close(model(X), plain(X))
    assert products_of(launches) == ["conv_gather_kernel", "pool_kernel", "conv_gather_kernel"]
    report = fastconv.report(model)
    assert (report.left, report.unfused, [pool.reason for pool in report.pools]) == ([], [], [None])


def test_a_patch_of_forward_may_come_to_our_kernels(monkeypatch) -> None:
    """A web UI casts weights and calls what it found."""
    model = fastconv.convert(torch.nn.Conv2d(3, 4, 3).to(DEVICE))
    expected = model(X)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", plus_one(torch.nn.Conv2d.forward))
    with record() as launches:
        close(model(X), expected + 1)
    assert products_of(launches) == ["conv_gather_kernel"]


@pytest.mark.parametrize("attribute", ["forward", "_conv_forward", "__call__"])
def test_a_patch_of_our_class(attribute: str, monkeypatch) -> None:
    model = fastconv.convert(layers())
    kind = type(model[0])
    with torch.no_grad():
        expected = fastconv.revert(copy.deepcopy(model))
        monkeypatch.setattr(kind, attribute, plus_one(getattr(kind, attribute)))
        expected[0].register_forward_hook(lambda module, args, y: y + 1)
        close(model(X), expected(X))
    assert dict(fastconv.report(model).left)["0"] == f"fastconv.nn.Conv2d.{attribute} is patched"


@pytest.mark.parametrize("attribute", ["forward", "_conv_forward", "_call_impl"])
def test_a_patch_of_one_layer(attribute: str) -> None:
    model = fastconv.convert(layers())
    with torch.no_grad():
        expected = fastconv.revert(copy.deepcopy(model))
        for each in (model, expected):
            setattr(each[0], attribute, plus_one(getattr(each[0], attribute)))
        close(model(X), expected(X))


@pytest.mark.parametrize("name", POOLS)
def test_every_pool_notices(name: str, monkeypatch) -> None:
    arguments = {"output_size": 2} if "Adaptive" in name else {"kernel_size": 2}
    pool = getattr(nn, name)(**arguments, **({"norm_type": 2} if "LP" in name else {}))
    theirs = getattr(torch.nn, name)
    monkeypatch.setattr(theirs, "forward", lambda self, x: "patched")
    assert pool(torch.rand(1, 2, *[4] * int(name[-2])).to(DEVICE)) == "patched"


@pytest.mark.parametrize("name", [name for name in nn.__all__ if name.startswith("Conv") and "BN" not in name])
def test_every_convolution_notices(name: str, monkeypatch) -> None:
    layer = getattr(nn, name)(2, 2, 2).to(DEVICE)
    attribute = "forward" if "Transpose" in name else "_conv_forward"
    monkeypatch.setattr(getattr(torch.nn, name), attribute, lambda self, x, *_: "patched")
    assert layer(torch.rand(1, 2, *[4] * int(name[-2])).to(DEVICE)) == "patched"


KINDS = [*_FUNCTIONS, *NORMS, *SKIPPED, *_FORMS, *(getattr(nn, name) for name in nn.__all__)]


@pytest.mark.parametrize("kind", dict.fromkeys(KINDS), ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_nothing_is_taken_for_a_patch(kind: Any) -> None:
    """Whatever version of torch this is."""
    assert patches.patched(kind) is None


def test_a_patch_of_a_function_that_a_forward_calls(monkeypatch) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn(self.conv(x)))

    model = fastconv.convert(Model().to(DEVICE).eval())
    assert fastconv.report(model).fused == ["conv + bn + relu"]
    with torch.no_grad():
        expected = model(X)
        monkeypatch.setattr(F, "relu", plus_one(F.relu))
        close(model(X), expected + 1)


@pytest.mark.parametrize("attribute", ["forward", "__call__"])
def test_a_child_whose_fused_layer_continues_in_its_caller(attribute: str, monkeypatch) -> None:
    class Caller(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.ConvBNAct2d(3, 3, 1, act=None)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.child(x)

    model = fastconv.convert(Caller().to(DEVICE).eval())
    with torch.no_grad():
        expected = model(X)
        monkeypatch.setattr(nn.ConvBNAct2d, attribute, plus_one(getattr(nn.ConvBNAct2d, attribute)))
        close(model(X), expected + 1)


def test_compiled(monkeypatch) -> None:
    torch._dynamo.reset()
    model = fastconv.convert(layers())
    plain = fastconv.revert(copy.deepcopy(model))
    monkeypatch.setattr(torch.nn.ReLU, "forward", plus_one(torch.nn.ReLU.forward))
    with torch.no_grad():
        close(torch.compile(model, fullgraph=True, backend="eager")(X), plain(X))
    torch._dynamo.reset()


def test_traced_by_fx(monkeypatch) -> None:
    model = fastconv.convert(layers())
    plain = fastconv.revert(copy.deepcopy(model))
    monkeypatch.setattr(F, "conv2d", plus_one(F.conv2d))
    with torch.no_grad():
        close(torch.fx.symbolic_trace(model)(X), plain(X))


def test_explain_names_it(monkeypatch) -> None:
    model = fastconv.convert(layers())
    monkeypatch.setattr(F, "relu", plus_one(F.relu))
    monkeypatch.setattr(F, "max_pool2d", plus_one(F.max_pool2d))
    text = str(fastconv.explain(model, X))
    assert "2 apart: torch.nn.functional.relu is patched" in text
    assert "PyTorch: torch.nn.functional.max_pool2d is patched" in text
