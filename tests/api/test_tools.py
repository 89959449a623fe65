"""Tools of others on a converted model: each gives what it gives of the plain one, or says to revert first."""

import copy
import io
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.ao import quantization
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
from torch.nn.utils import fusion, parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import fastconv
from convolutions import products_of
from fastconv import nn
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.interpreter import interpreting
from fastconv.kernels.launch.launch import record
from tests.marks import DEVICE

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
    *([] if interpreter.interpreting() else [pytest.mark.gpu]),
]

TOLERANCE = 1e-4 if interpreting() else 1e-2
SAYS = r"knows torch\.nn's layers, not fastconv's: call fastconv\.revert\(model\) first$"
needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not installed",
)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = (
            torch.nn.Conv2d(3, 4, 3, padding="same"),
            torch.nn.BatchNorm2d(4),
            torch.nn.ReLU(),
        )
        self.pool, self.up = torch.nn.MaxPool2d(2), torch.nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)
        self.mean, self.head = torch.nn.AvgPool2d(2), torch.nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mean(self.up(self.pool(self.act(self.bn(self.conv(x)))))))


class Layers(torch.nn.Sequential):
    """Layers that torch.ao.quantization knows by default."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.MaxPool2d(2))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def both(kind: Callable[[], torch.nn.Module] = Net, device: str = DEVICE) -> tuple[Any, Any, Tensor]:
    """A converted model in eval, its plain twin, an input."""
    torch.manual_seed(0)
    plain = kind().to(device).eval()
    for norm in plain.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2)
    return fastconv.convert(copy.deepcopy(plain)), plain, X.to(device)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.cpu(), b.cpu(), rtol=TOLERANCE, atol=TOLERANCE)


# Graphs that are to run elsewhere


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "with gradients"])
def test_traced_by_jit(gradients: bool) -> None:
    """A trace holds PyTorch's operators: it needs no fastconv, and takes other sizes."""
    model, plain, x = both()
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert "fastconv::" not in str(loaded.inlined_graph) and "PythonOp" not in str(loaded.inlined_graph)
    assert str(loaded.inlined_graph).count("aten::_convolution") == 3
    for size in ((2, 3, 8, 8), (1, 3, 12, 16)):
        x = torch.randn(size, device=DEVICE)
        close(loaded(x), plain(x))
    with record() as launches:
        close(model(X.to(DEVICE)), plain(X.to(DEVICE)))
    assert products_of(launches)


def test_scripted() -> None:
    model, plain, x = both()
    with pytest.raises(RuntimeError, match=rf"^torch\.jit\.script {SAYS}"):
        torch.jit.script(model)
    for layer in (nn.Conv1d(2, 2, 3), nn.AvgPool2d(2), nn.LazyConv2d(2, 3), nn.ConvBNAct2d(3, 4, 3)):
        with pytest.raises(RuntimeError, match=SAYS):
            torch.jit.script(layer)
    close(model(x), plain(x))
    close(torch.jit.script(fastconv.revert(model))(x), plain(x))


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "with gradients"])
def test_exported(gradients: bool) -> None:
    model, plain, x = both()
    with torch.set_grad_enabled(gradients):
        exported = torch.export.export(model, (x,))
        assert "fastconv" in str(exported.graph)
        if not gradients:
            exported = exported.run_decompositions()
        close(exported.module()(x), plain(x))


@needs_onnx
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("reverted", [True, False], ids=["reverted", "converted"])
def test_onnx(reverted: bool, dynamo: bool, tmp_path) -> None:
    import onnxruntime

    model, plain, x = both()
    if reverted:
        fastconv.revert(model)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), path, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.cpu().numpy()})
    close(torch.from_numpy(y), plain(x))


# Quantisation


def prepare(model: torch.nn.Module) -> torch.nn.Module:
    model.qconfig = quantization.get_default_qconfig("fbgemm")  # type: ignore[assignment]
    return quantization.prepare(model)


def prepare_qat(model: torch.nn.Module) -> torch.nn.Module:
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    return quantization.prepare_qat(model.train())


def prepare_graph(model: torch.nn.Module) -> torch.nn.Module:
    return prepare_fx(model, quantization.get_default_qconfig_mapping("fbgemm"), (X,))


def prepare_qat_graph(model: torch.nn.Module) -> torch.nn.Module:
    return prepare_qat_fx(model.train(), quantization.get_default_qat_qconfig_mapping("fbgemm"), (X,))


@pytest.mark.parametrize("step", [prepare, prepare_qat, prepare_graph, prepare_qat_graph])
def test_quantisation_wants_plain_layers(step: Callable[..., Any]) -> None:
    model, plain, _ = both(Layers, "cpu")
    with pytest.raises(RuntimeError, match=rf"^torch\.ao\.quantization {SAYS}"):
        step(copy.deepcopy(model))
    fastconv.revert(model)
    prepared, expected = step(model), step(plain)
    assert [type(layer).__name__ for layer in prepared.modules()] == [type(m).__name__ for m in expected.modules()]


def test_transposed_layers_are_not_passed_over_either() -> None:
    model = fastconv.convert(torch.nn.Sequential(torch.nn.ConvTranspose2d(3, 4, 2)).eval())
    with pytest.raises(RuntimeError, match=SAYS):
        prepare_graph(copy.deepcopy(model))
    model.qconfig = quantization.default_qconfig
    with pytest.raises(RuntimeError, match=SAYS):
        quantization.prepare(model)


def test_fusing_for_quantisation_stops() -> None:
    model, _, _ = both(Layers, "cpu")
    with pytest.raises((AssertionError, NotImplementedError), match=r"fastconv\.nn\.conv\.Conv2d"):
        quantization.fuse_modules(model, [["0", "1", "2"]])
    fused = quantization.fuse_modules(fastconv.revert(model), [["0", "1", "2"]])
    assert type(fused[0]) is torch.ao.nn.intrinsic.ConvReLU2d


def test_other_layers_can_be_quantised() -> None:
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2)).eval()
    model = quantization.quantize_dynamic(fastconv.convert(copy.deepcopy(plain)), {torch.nn.Linear})
    assert (type(model[0]), type(model[2]).__module__) == (nn.Conv2d, "torch.ao.nn.quantized.dynamic.modules.linear")
    torch.testing.assert_close(model(X), plain(X), rtol=0.1, atol=0.1)
    model = fastconv.convert(copy.deepcopy(plain))
    model[0].qconfig = None
    observed = [name for name, m in prepare(model).named_modules() if hasattr(m, "activation_post_process")]
    assert observed == ["2"]


@pytest.mark.parametrize("step", [prepare, prepare_graph])
def test_a_prepared_model_stays_plain(step: Callable[..., Any]) -> None:
    _, plain, _ = both(Layers, "cpu")
    prepared = step(plain)
    kinds = [type(layer) for layer in prepared.modules()]
    report = fastconv.report(fastconv.convert(prepared))
    assert [type(layer) for layer in prepared.modules()] == kinds
    assert {reason for _, reason in report.left} == {"prepared for quantisation"}
    if step is prepare_graph:
        prepared(X)
        assert "torch.ao.nn" in str([type(layer).__module__ for layer in convert_fx(prepared).modules()])


# What changes layers, or looks for them by isinstance


def with_weight_norm(model: Any) -> Any:
    parametrizations.weight_norm(model.conv)
    return model


def with_spectral_norm(model: Any) -> Any:
    torch.manual_seed(1)
    parametrizations.spectral_norm(model.conv)
    return model


def pruned(model: Any) -> Any:
    prune.l1_unstructured(model.conv, "weight", 0.5)
    prune.ln_structured(model.head, "weight", 0.5, n=2, dim=0)
    return model


def initialised(model: Any) -> Any:
    def init(layer: torch.nn.Module) -> None:
        if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            torch.nn.init.constant_(layer.weight, 0.1)

    return model.apply(init)


def folded(model: Any) -> Any:
    model.conv = fusion.fuse_conv_bn_eval(model.conv, model.bn)
    model.bn = torch.nn.Identity()
    return model


def synchronised(model: Any) -> Any:
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)


def averaged(model: Any) -> Any:
    average = AveragedModel(model)
    average.update_parameters(model)
    return average


@pytest.mark.parametrize(
    "tool", [with_weight_norm, with_spectral_norm, pruned, initialised, folded, synchronised, averaged]
)
def test_works_on_a_converted_model(tool: Callable[..., Any]) -> None:
    model, plain, x = both()
    model, plain = tool(model), tool(plain)
    with torch.no_grad(), record() as launches:
        close(model(x), plain(x))
    assert len(products_of(launches)) == 5


# What counts


def test_a_counter_that_patches_functions(monkeypatch) -> None:
    """As the profilers of DeepSpeed and ptflops."""
    model, plain, x = both()
    counted: list[str] = []

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            counted.append(name)
            return function(*args, **kwargs)

        return count

    for name in ("conv2d", "conv_transpose2d", "batch_norm", "relu", "max_pool2d", "avg_pool2d"):
        monkeypatch.setattr(torch.nn.functional, name, counting(name, getattr(torch.nn.functional, name)))
    close(model(x), plain(x))
    assert counted[:7] == counted[7:] and len(counted) == 14


def test_a_table_of_hooks() -> None:
    """As torchinfo's and torchsummary's, which name a layer by its class."""
    shapes: list[list[tuple[str, torch.Size]]] = []
    for model in both()[:2]:
        seen: list[tuple[str, torch.Size]] = []
        for layer in model.modules():
            layer.register_forward_hook(lambda m, _, y, seen=seen: seen.append((type(m).__name__, y.shape)))
        model(X.to(DEVICE))
        shapes.append(seen)
    assert shapes[0] == shapes[1] and len(shapes[0]) == 8


def test_a_counter_that_looks_classes_up() -> None:
    """As thop's, which gives every layer a buffer and then hooks those that its table has."""
    table = dict.fromkeys((torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.BatchNorm2d))
    hooked: list[type] = []

    def add_hooks(layer: torch.nn.Module) -> None:
        if not layer._modules:
            layer.register_buffer("total_ops", torch.zeros(1))
            hooked.extend({type(layer)} & table.keys())

    model, plain, _ = both()
    with pytest.raises(RuntimeError, match=rf"^thop {SAYS}"):
        model.apply(add_hooks)
    fastconv.revert(model).apply(add_hooks)
    plain.apply(add_hooks)
    assert hooked[:4] == hooked[4:] and len(hooked) == 8
