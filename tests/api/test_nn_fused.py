"""ConvBNAct1d to 3d against torch.nn's three layers: numbers, state, what is hooked, replaced, copied."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import fastconv
from convolutions import products_of
from fastconv import nn
from fastconv.activations import NAMED, activation_of
from fastconv.kernels.launch.launch import record
from tests.marks import DEVICE, runs_kernels

pytestmark = runs_kernels

# name -> (class, arguments, input, whether there is a residual)
LAYERS: dict[str, tuple[str, dict[str, Any], tuple[int, ...], bool]] = {
    "1d": ("ConvBNAct1d", {"kernel_size": 3, "stride": 2, "padding": 1}, (2, 4, 9), False),
    "2d": ("ConvBNAct2d", {"kernel_size": 3, "padding": 1}, (2, 4, 5, 6), False),
    "2d residual": ("ConvBNAct2d", {"kernel_size": 3, "padding": 1, "act": "silu"}, (2, 4, 5, 6), True),
    "2d grouped, reflected": (
        "ConvBNAct2d",
        {"kernel_size": 3, "padding": 1, "groups": 2, "padding_mode": "reflect", "act": "hardswish"},
        (2, 4, 5, 6),
        False,
    ),
    "2d same, no activation": ("ConvBNAct2d", {"kernel_size": 3, "padding": "same", "act": None}, (2, 4, 5, 6), True),
    "2d bias, module": (
        "ConvBNAct2d",
        {"kernel_size": 1, "bias": True, "act": torch.nn.LeakyReLU(0.2)},
        (2, 4, 5, 6),
        True,
    ),
    "3d": ("ConvBNAct3d", {"kernel_size": 2, "act": "gelu_tanh"}, (2, 4, 3, 4, 3), False),
}


def make(name: str) -> tuple[Any, Any, Tensor, Tensor | None]:
    """A layer of ours, the same in fp64 with torch.nn's children, an input, a residual."""
    cls, arguments, shape, with_residual = LAYERS[name]
    torch.manual_seed(0)
    layer = getattr(nn, cls)(4, 6, **copy.deepcopy(arguments)).to(DEVICE)
    with torch.no_grad():
        for value in (layer.bn.weight, layer.bn.bias):
            value.uniform_(0.5, 1.5)
    plain = fastconv.revert(copy.deepcopy(layer)).double()
    assert type(plain.conv).__module__ == "torch.nn.modules.conv"
    x = torch.randn(shape, device=DEVICE)
    residual = torch.randn_like(copy.deepcopy(plain).float()(x)) if with_residual else None
    return layer, plain, x, residual


def close(a: Tensor, b: Tensor, what: str) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("name", LAYERS)
def test_training_and_inference(name: str) -> None:
    layer, plain, x, residual = make(name)
    ours = [t.clone().requires_grad_() for t in (x, residual) if t is not None]
    theirs = [t.double().requires_grad_() for t in (x, residual) if t is not None]
    with record() as launches:
        z = layer(*ours)
    assert [launch.name for launch in launches][-1] == "batch_norm_act_kernel"
    expected = plain(*theirs)
    close(z, expected, "z")
    dz = torch.randn_like(z)
    z.backward(dz)
    expected.backward(dz.double())
    for what, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        close(a.grad, b.grad, f"gradient of input {what}")
    for (what, a), b in zip(layer.named_parameters(), plain.parameters(), strict=True):
        close(a.grad, b.grad, f"gradient of {what}")
    for (what, a), b in zip(layer.named_buffers(), plain.buffers(), strict=True):
        close(a, b, what)
    layer.eval(), plain.eval()
    with torch.no_grad(), record() as launches:
        z = layer(*ours)
        close(z, plain(*theirs), "z in inference")
    assert products_of(launches) == ["conv_gather_kernel"]


@pytest.mark.parametrize("name", ["1d", "2d", "3d"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "weights_only"])
def test_copies(name: str, how: str) -> None:
    layer, _, x, _ = make(name)
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        norms = [torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.ReLU, torch.nn.GELU]
        with torch.serialization.safe_globals(norms):
            twin = torch.load(file, weights_only=how == "weights_only")
    assert type(twin) is type(layer)
    assert torch.equal(twin(x), layer(x))


def test_its_children() -> None:
    layer = nn.ConvBNAct2d(4, 6, 3)
    assert [(name, type(child).__name__) for name, child in layer.named_children()] == [
        ("conv", "Conv2d"),
        ("bn", "BatchNorm2d"),
        ("act", "ReLU"),
    ]
    assert type(layer.conv) is nn.Conv2d and layer.conv.bias is None
    assert list(layer.state_dict()) == [
        "conv.weight",
        *(f"bn.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    ]
    none = nn.ConvBNAct2d(4, 6, 3, act=None, bias=True)
    assert none.act is None and none.conv.bias is not None
    norm = nn.ConvBNAct2d(4, 6, 3, norm=lambda channels: torch.nn.BatchNorm2d(channels, eps=0.1))
    assert norm.bn.eps == 0.1
    meta = nn.ConvBNAct3d(4, 6, 3, device="meta", dtype=torch.float16)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert {p.dtype for p in meta.parameters()} == {torch.float16}


def test_names_are_those_of_the_function() -> None:
    for name, activation in NAMED.items():
        assert activation_of(name) == activation_of(activation.module())


@pytest.mark.parametrize("act", ["reul", ""])
def test_an_unknown_activation(act: str) -> None:
    with pytest.raises(ValueError, match=f"act must be a module, None or one of elu, .*got '{act}'"):
        nn.ConvBNAct2d(4, 6, 3, act=act)


def test_an_activation_without_a_fused_form_is_its_own_module() -> None:
    layer = nn.ConvBNAct2d(4, 6, 3, act=torch.nn.Softsign()).to(DEVICE)
    x = torch.randn(2, 4, 5, 5, device=DEVICE)
    with record() as launches:
        z = layer(x)
    assert [launch.name for launch in launches][-1] == "batch_norm_act_kernel"
    close(z, torch.nn.functional.softsign(torch.nn.BatchNorm2d(6).to(DEVICE)(layer.conv(x))), "z")
    report = fastconv.report(layer)
    assert (report.fused, report.norms[0].reason) == (["conv + bn"], "Softsign has no fused form")


def test_a_residual_that_broadcasts_or_does_not_fit() -> None:
    layer, plain, x, _ = make("2d")
    residual = torch.randn(2, 6, 1, 1, device=DEVICE)
    close(layer(x, residual), plain(x.double(), residual.double()), "z")
    with pytest.raises(RuntimeError, match="must match the size"):
        layer(x, torch.randn(2, 6, 2, 2, device=DEVICE))


def test_hooks_and_replaced_children() -> None:
    layer, plain, x, _ = make("2d")
    seen: list[str] = []
    handle = layer.bn.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    close(layer(x), plain(x.double()), "hooked")
    assert seen == ["BatchNorm2d"]
    assert fastconv.report(layer).unfused == [("bn", "a hook on its BatchNorm2d")]
    handle.remove()
    assert fastconv.report(layer).fused == ["conv + bn + act"]
    for m in (layer, plain):
        torch.nn.utils.parametrizations.weight_norm(m.conv)
        m.act = torch.nn.Tanh()
    close(layer(x), plain(x.double()), "parametrised")
    for m in (layer, plain):
        m.bn = torch.nn.InstanceNorm2d(6)
    close(layer(x), plain(x.double()), "another norm")


def test_sync_batch_norm_alone() -> None:
    layer, plain, x, _ = make("2d")
    layer = torch.nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert type(layer.bn) is torch.nn.SyncBatchNorm
    with record() as launches:
        close(layer(x), plain(x.double()), "z")
    assert [launch.name for launch in launches][-1] == "batch_norm_act_kernel"


def test_fx_sees_the_children() -> None:
    layer, plain, x, _ = make("2d")
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(layer.eval()))
    modules = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    assert modules == ["0.bn", "0.act"]
    close(traced(x), plain.eval()(x.double()), "z")


def test_in_a_converted_model() -> None:
    model = torch.nn.Sequential(nn.ConvBNAct2d(4, 4, 3), torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4))
    report = fastconv.report(fastconv.convert(model))
    assert report.fused == ["0.conv + bn + act", "1 + 2"]
    assert report.summary == "2 of 2 convolution layers on fastconv's kernels, 2 of 2 batch norms fused into them"
    fastconv.revert(model)
    assert fastconv.report(model).unfused == [("0.bn", "its convolution is a Conv2d"), ("2", "not converted")]


def test_autocast_and_other_dtypes() -> None:
    layer, plain, x, _ = make("2d")
    with torch.autocast(DEVICE, torch.bfloat16), record() as launches:
        z = layer(x)
    assert z.dtype is torch.bfloat16 and len(launches) > 1
    torch.testing.assert_close(z.double(), plain(x.double()), rtol=3e-2, atol=3e-2)
    with record() as launches:
        layer.double()(x.double())
    assert not launches


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled_whole(training: bool) -> None:
    torch._dynamo.reset()
    layer, plain, x, residual = make("2d residual")
    layer.train(training), plain.train(training)
    assert residual is not None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with record() as launches:
        z = compiled(x, residual)
        z.square().sum().backward()
    assert len(launches) > 3
    expected = plain(x.double(), residual.double())
    expected.square().sum().backward()
    close(z, expected, "z")
    for (what, a), b in zip(layer.named_parameters(), plain.parameters(), strict=True):
        close(a.grad / b.grad.abs().max(), b.grad / b.grad.abs().max(), f"gradient of {what}")
    for (what, a), b in zip(layer.named_buffers(), plain.buffers(), strict=True):
        close(a, b, what)
    torch._dynamo.reset()
