"""convert, revert and report: what is swapped, what is left and why, and that a converted model is the same model."""

import copy
import io
import re
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import fastconv
from convolutions import products_of
from fastconv import nn
from fastconv.kernels.launch.interpreter import interpreting
from fastconv.kernels.launch.launch import record
from tests.marks import DEVICE, runs_kernels

pytestmark = runs_kernels
CLASSES = [name for name in nn.__all__ if hasattr(torch.nn, name) and "Conv" in name]
needs_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")


class Tutorial(torch.nn.Module):
    """The net of PyTorch's image classification tutorial, ``view`` and all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 6, 5)
        self.pool = torch.nn.MaxPool2d(2, 2)
        self.conv2 = torch.nn.Conv2d(6, 16, 5)
        self.fc1 = torch.nn.Linear(16 * 5 * 5, 120)
        self.fc2 = torch.nn.Linear(120, 84)
        self.fc3 = torch.nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.nn.functional.relu(self.conv1(x)))
        x = self.pool(torch.nn.functional.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        x = torch.nn.functional.relu(self.fc1(x))
        return self.fc3(torch.nn.functional.relu(self.fc2(x)))


class Tagged(torch.nn.Conv2d):
    """A user's subclass."""


def small() -> torch.nn.Sequential:
    """One layer of every rank and kind, with names ``0`` to ``5``."""
    conv = torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d
    transposed = torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d
    return torch.nn.Sequential(*(cls(4, 6, 3) for cls in (*conv, *transposed)))


def kernels_of(model: torch.nn.Module, *inputs: Tensor) -> list[str]:
    with record() as launches, torch.no_grad():
        model(*inputs)
    return products_of(launches)


# What is swapped


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_and_back(name: str) -> None:
    lazy = name.startswith("Lazy")
    layer = getattr(torch.nn, name)(*([6, 3] if lazy else [4, 6, 3]))
    state, text = set(vars(layer)), repr(layer)
    assert fastconv.convert(layer) is layer
    assert type(layer) is getattr(nn, name)
    assert fastconv.report(layer).replaced == [""]
    assert (set(vars(layer)), repr(layer)) == (state, text)
    assert fastconv.revert(layer) is layer
    assert type(layer) is getattr(torch.nn, name)
    assert set(vars(layer)) == state


@pytest.mark.parametrize("name", [name for name in CLASSES if name.startswith("Lazy")])
def test_a_converted_lazy_layer_becomes_ours(name: str) -> None:
    layer = fastconv.convert(getattr(torch.nn, name)(6, 3), memory_format=torch.channels_last)
    layer(torch.randn(1, 4, *[5] * int(name[-2])))
    assert type(layer) is getattr(nn, name.removeprefix("Lazy"))


def test_the_model_stays_the_same() -> None:
    model = small()
    parameters, state, text = list(model.parameters()), copy.deepcopy(model.state_dict()), repr(model)
    ids = [id(module) for module in model.modules()]
    assert fastconv.convert(model) is model
    assert [id(module) for module in model.modules()] == ids
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    assert repr(model) == text
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.load_state_dict(state).missing_keys == []


def test_twice_is_once() -> None:
    model = fastconv.convert(fastconv.convert(small()))
    assert len(fastconv.report(model).replaced) == 6
    fastconv.revert(fastconv.revert(model))
    assert [type(layer) for layer in model] == [type(layer) for layer in small()]


def test_our_own_layers_revert_too() -> None:
    assert type(fastconv.revert(nn.Conv2d(3, 4, 3))) is torch.nn.Conv2d


@pytest.mark.parametrize("how", ["deepcopy", "torch.save", "torch.save, weights_only"])
def test_a_copy_of_a_converted_model(how: str) -> None:
    model = fastconv.convert(small())
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        with torch.serialization.safe_globals([torch.nn.Sequential]):
            twin = torch.load(file, weights_only="weights_only" in how)
    assert [type(layer) for layer in twin] == [type(layer) for layer in model]
    assert all(map(torch.equal, twin.state_dict().values(), model.state_dict().values()))


def test_hooks_stay() -> None:
    seen: list[str] = []
    model = Tutorial().to(DEVICE)
    model.conv1.register_forward_pre_hook(lambda *_: seen.append("before"))
    handle = model.conv1.register_forward_hook(lambda *_: seen.append("after"))
    model.conv1.register_full_backward_hook(lambda *_: seen.append("backward"))
    fastconv.convert(model)
    assert "conv1" in fastconv.report(model).replaced
    model(torch.randn(2, 3, 32, 32, device=DEVICE)).sum().backward()
    assert seen == ["before", "after", "backward"]
    handle.remove()
    model(torch.randn(2, 3, 32, 32, device=DEVICE))
    assert seen[3:] == ["before"]


def test_a_shared_layer_and_tied_weights() -> None:
    shared, tied = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 3, padding=1)
    tied.weight = shared.weight
    model = torch.nn.Sequential(shared, torch.nn.ReLU(), shared, tied).to(DEVICE)
    plain = copy.deepcopy(model).double()
    fastconv.convert(model, memory_format=torch.channels_last)
    assert model[0] is model[2] and model[3].weight is model[0].weight
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert fastconv.report(model).replaced == ["0", "3"]
    x = torch.randn(2, 4, 6, 6, device=DEVICE)
    with record() as launches:
        y = model(x)
    assert len(products_of(launches)) == 3
    y.square().sum().backward()
    plain(x.double()).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-2, atol=1e-2)


# What is left


def own_forward() -> torch.nn.Module:
    layer = torch.nn.Conv2d(3, 4, 3)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def quantised() -> torch.nn.Module:
    from torch.ao.nn.quantized.dynamic import Conv2d

    return Conv2d(3, 4, 3)


def plain() -> torch.nn.Conv2d:
    return torch.nn.Conv2d(3, 4, 3)


LEFT = {
    "subclass": (lambda: Tagged(3, 4, 3), "a class of its own: .*Tagged"),
    "weight_norm": (lambda: parametrizations.weight_norm(plain()), "parametrised: weight"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(plain()), "parametrised: weight"),
    "weight_norm by hook": (lambda: weight_norm(plain()), "parametrised: weight, set .* by WeightNorm"),
    "spectral_norm by hook": (lambda: spectral_norm(plain()), "parametrised: weight, set .* by SpectralNorm"),
    "pruned": (lambda: prune.l1_unstructured(plain(), "weight", 0.5), "parametrised: weight, set .* by L1Unstructured"),
    "pruned bias": (lambda: prune.l1_unstructured(plain(), "bias", 2), "parametrised: bias, set .* by L1Unstructured"),
    "scripted": (lambda: torch.jit.script(plain()), "scripted"),
    "traced": (lambda: torch.jit.trace(plain(), torch.randn(1, 3, 5, 5)), "scripted"),
    "quantised": (quantised, "quantised"),
    "own forward": (own_forward, "a forward of its own"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LEFT)
def test_left_alone_and_reported(name: str) -> None:
    make, reason = LEFT[name]
    model = torch.nn.Sequential(make(), torch.nn.Conv2d(4, 4, 1))
    cls, x = type(model[0]), torch.randn(1, 3, 5, 5)
    model.eval()
    before = model[0](x)
    fastconv.convert(model)
    assert type(model[0]) is cls
    assert torch.equal(model[0](x), before)
    report = fastconv.report(model)
    assert report.replaced == ["1"]
    (left,) = report.left
    assert left[0] == "0"
    assert re.fullmatch(reason, left[1]), left[1]
    fastconv.revert(model)
    assert [type(layer) for layer in model] == [cls, torch.nn.Conv2d]


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_model() -> None:
    model = torch.jit.script(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()))
    fastconv.convert(model)
    assert fastconv.report(model).left == [("0", "scripted")]


def test_a_layer_parametrised_or_subclassed_from_ours_is_ours() -> None:
    class Mine(nn.Conv2d):
        pass

    model = torch.nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), Mine(4, 4, 3))
    types = [type(layer) for layer in model]
    assert fastconv.report(fastconv.convert(model, memory_format=torch.channels_last)).replaced == ["0", "1"]
    fastconv.revert(model)
    assert [type(layer) for layer in model] == types


def test_nothing_to_convert() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    report = fastconv.report(fastconv.convert(model))
    assert (report.replaced, report.left) == ([], [])
    assert str(report) == "nothing to convert: the model has no convolution layers and no pools"


def test_report_is_a_table() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), Tagged(4, 4, 3), torch.nn.ConvTranspose1d(4, 4, 3))
    assert [reason for _, reason in fastconv.report(model).left] == [
        "not converted",
        f"a class of its own: {__name__}.Tagged",
        "not converted",
    ]
    assert str(fastconv.report(fastconv.convert(model))).splitlines() == [
        "layer  kind             served by",
        "0      Conv2d           fastconv",
        f"1      Tagged           PyTorch    a class of its own: {__name__}.Tagged",
        "2      ConvTranspose1d  fastconv",
        "2 of 3 convolution layers on fastconv's kernels",
    ]


# include, exclude, memory_format


def nested() -> torch.nn.Module:
    block = [torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), Tutorial()) for _ in range(2)]
    return torch.nn.ModuleDict({"stem": torch.nn.Conv2d(3, 4, 3), "body": torch.nn.Sequential(*block)})


EVERY = ["stem", "body.0.0", "body.0.1.conv1", "body.0.1.conv2", "body.1.0", "body.1.1.conv1", "body.1.1.conv2"]


@pytest.mark.parametrize(
    ("arguments", "replaced"),
    [
        ({}, EVERY),
        ({"include": "stem"}, ["stem"]),
        ({"include": "body.1"}, ["body.1.0", "body.1.1.conv1", "body.1.1.conv2"]),
        ({"include": ["*.conv1", "stem"]}, ["stem", "body.0.1.conv1", "body.1.1.conv1"]),
        ({"include": Tutorial}, ["body.0.1.conv1", "body.0.1.conv2", "body.1.1.conv1", "body.1.1.conv2"]),
        ({"exclude": "body"}, ["stem"]),
        ({"exclude": (Tutorial, "stem")}, ["body.0.0", "body.1.0"]),
        ({"include": "body.0", "exclude": "*.conv2"}, ["body.0.0", "body.0.1.conv1"]),
        ({"include": torch.nn.ConvTranspose2d}, []),
        ({"include": []}, []),
        ({"exclude": []}, EVERY),
        ({"exclude": ""}, []),
    ],
    ids=str,
)
def test_include_and_exclude(arguments: dict, replaced: list[str]) -> None:
    model = fastconv.convert(nested(), **arguments)
    assert fastconv.report(model).replaced == replaced
    assert {reason for _, reason in fastconv.report(model).left} <= {"not converted"}


def test_a_shared_layer_is_excluded_by_any_of_its_names() -> None:
    conv = torch.nn.Conv2d(3, 3, 3)
    model = torch.nn.ModuleDict({"a": conv, "b": conv})
    assert fastconv.report(fastconv.convert(model, exclude="b")).replaced == []
    assert fastconv.report(fastconv.convert(model, include="b")).replaced == ["a"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"include": "bdoy"}, ValueError, "convert: include='bdoy' names no module of the model"),
        ({"exclude": 3}, TypeError, "convert: exclude takes names and types of modules, but got 3"),
        ({"exclude": [int]}, TypeError, "convert: exclude takes names and types of modules, but got <class 'int'>"),
        ({"memory_format": "channels_last"}, TypeError, "convert: memory_format must be one of .*'channels_last'"),
        ({"memory_format": torch.preserve_format}, ValueError, "convert: memory_format must be one of .*preserve"),
        ({"fused": True}, TypeError, "fused"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    model = nested()
    with pytest.raises(error, match=message) as raised:
        fastconv.convert(model, **arguments)
    assert "\n" not in str(raised.value)
    assert fastconv.report(model).replaced == []


@pytest.mark.parametrize("function", [fastconv.convert, fastconv.revert, fastconv.report, fastconv.explain])
def test_what_is_no_model(function) -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, but got dict"):
        function({})


def test_memory_format_converts_the_weights_of_its_rank() -> None:
    model = torch.nn.Sequential(*small(), Tagged(4, 4, 3))
    fastconv.convert(model, memory_format=torch.channels_last)
    last = [
        layer.weight.dim() == 4 and layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in model
    ]
    assert last == [False, True, False, False, True, False, False]
    fastconv.convert(model, memory_format=torch.channels_last_3d)
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last_3d)
    fastconv.convert(model, memory_format=torch.contiguous_format)
    assert all(layer.weight.is_contiguous() for layer in model)


def test_memory_format_of_what_is_excluded_stays() -> None:
    model = fastconv.convert(small(), memory_format=torch.channels_last, exclude="1")
    assert model[1].weight.is_contiguous() and not model[4].weight.is_contiguous()


# Whole models


@pytest.mark.parametrize("memory_format", [None, torch.channels_last], ids=str)
def test_tutorial_net_trains(memory_format: torch.memory_format | None) -> None:
    torch.manual_seed(0)
    plain = Tutorial().double().to(DEVICE)
    model = fastconv.convert(copy.deepcopy(plain).float(), memory_format=memory_format)
    x = torch.randn(4, 3, 32, 32, device=DEVICE)
    if memory_format is not None:
        # As with PyTorch's own layers, ``view`` wants the format back.
        model.pool.register_forward_hook(lambda module, inputs, output: output.contiguous())
    with record() as launches:
        y = model(x)
        y.square().sum().backward()
    # fprop twice, dgrad of the second layer, wgrad twice with its reduction if pixels are split.
    names = products_of(launches)
    assert names[:4] == ["conv_gather_kernel", "pool_kernel"] * 2
    assert names.count("conv_gather_kernel") == 3
    assert names.count("conv_wgrad_kernel") == 2
    plain(x.double()).square().sum().backward()
    tolerance = 1e-4 if interpreting() else 1e-2
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("train", [False, True], ids=["infer", "train"])
def test_compile_without_a_graph_break(train: bool) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = fastconv.convert(Tutorial().to(DEVICE).train(train))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (4, 6):
        x = torch.randn(batch, 3, 32, 32, device=DEVICE)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.set_grad_enabled(train), record() as launches:
            y = compiled(x)
            expected = model(x)
            torch.testing.assert_close(y, expected)
            if train:
                weight = model.conv2.weight
                (gradient,) = torch.autograd.grad(y.square().sum(), weight)
                torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), weight)[0])
        assert products_of(launches).count("conv_gather_kernel") >= 4
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_compiled_model_converted_later() -> None:
    torch._dynamo.reset()
    model = Tutorial().to(DEVICE).eval()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 3, 32, 32, device=DEVICE)
    before = compiled(x)
    fastconv.convert(compiled)
    assert kernels_of(compiled, x) == ["conv_gather_kernel", "pool_kernel"] * 2
    torch.testing.assert_close(compiled(x), before, rtol=1e-2, atol=1e-2)
    torch._dynamo.reset()


def test_autocast_keeps_weights_in_fp32() -> None:
    torch.manual_seed(0)
    model = fastconv.convert(Tutorial().to(DEVICE))
    x = torch.randn(4, 3, 32, 32, device=DEVICE)
    with record() as launches, torch.autocast(DEVICE, torch.bfloat16):
        loss = model(x).float().square().sum()
    loss.backward()
    assert {launch.dtypes[:2] for launch in launches} == {(torch.bfloat16, torch.bfloat16)}
    assert len(launches) >= 2
    assert model.conv1.weight.dtype is model.conv1.weight.grad.dtype is torch.float32
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = fastconv.revert(model)(x).float().square().sum()
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=1e-3)


@needs_torchvision
def test_resnet18_traced_by_fx() -> None:
    from fastconv.benchmarks.models import torchvision

    torch.manual_seed(0)
    plain = torchvision().models.resnet18(num_classes=10).to(DEVICE).eval()
    model = fastconv.convert(copy.deepcopy(plain), memory_format=torch.channels_last)
    assert len(fastconv.report(model).replaced) == 20
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 3, 32, 32, device=DEVICE)
    conv, pool = ["conv_gather_kernel"], ["pool_kernel"]
    assert kernels_of(traced, x) == conv + pool + conv * 19 + pool
    with torch.no_grad():
        tolerance = 1e-4 if interpreting() else 2e-2
        torch.testing.assert_close(traced(x), plain(x), rtol=tolerance, atol=tolerance)


@needs_torchvision
def test_feature_extractor() -> None:
    from fastconv.benchmarks.models import torchvision

    torchvision()
    from torchvision.models.feature_extraction import create_feature_extractor

    plain = torchvision().models.resnet18().to(DEVICE).eval()
    nodes = {"conv1": "stem", "layer1": "features", "layer2.0.downsample.0": "shortcut"}
    x = torch.randn(1, 3, 32, 32, device=DEVICE)
    with torch.no_grad():
        expected = create_feature_extractor(plain, nodes)(x)
        features = create_feature_extractor(fastconv.convert(copy.deepcopy(plain)), nodes)(x)
    assert features.keys() == expected.keys()
    for name, feature in features.items():
        torch.testing.assert_close(feature, expected[name], rtol=2e-2, atol=2e-2)


def test_depthwise_weights_are_laid_out_by_taps() -> None:
    """What its kernels read as it is, its gradient and its optimizer keep, and the state_dict does not show."""
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=4), torch.nn.ConvTranspose2d(8, 8, 3, groups=8))
    model = fastconv.convert(copy.deepcopy(plain), memory_format=torch.channels_last).to(DEVICE)
    for layer in model:
        k, _, r, s = layer.weight.shape
        assert layer.weight.stride() == (1, k * r * s, s * k, k)
    x = torch.randn(2, 4, 6, 6).to(DEVICE)
    model(x).square().sum().backward()
    plain.to(DEVICE)(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.grad.stride() == ours.stride()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).step()
    plain.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    assert [p.stride() for p in twin.parameters()] == [p.stride() for p in model.parameters()]
    torch.testing.assert_close(plain(x), twin(x), rtol=1e-4, atol=1e-4)
    fastconv.convert(model, memory_format=torch.contiguous_format)
    assert all(p.is_contiguous() for p in model.parameters())
