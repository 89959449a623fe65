"""fastconv.functional's convolutions against torch.nn.functional's: results, gradients, formats, errors, work done."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fastconv.functional as ours
from fastconv import settings
from fastconv.kernels.launch.launch import record
from reference import assert_close, assert_equal, integers
from tests.marks import DEVICE, runs_kernels

pytestmark = runs_kernels

# name -> (function, input, weight, arguments)
CALLS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "conv1d": ("conv1d", (2, 6, 11), (4, 6, 3), {"stride": 2, "padding": 1}),
    "conv1d same": ("conv1d", (2, 3, 8), (4, 3, 4), {"padding": "same", "dilation": 2}),
    "conv2d": ("conv2d", (2, 6, 7, 6), (8, 6, 3, 3), {"padding": 1}),
    "conv2d valid": ("conv2d", (2, 6, 7, 6), (8, 6, 3, 3), {"padding": "valid", "stride": (2, 1)}),
    "conv2d uneven same": ("conv2d", (2, 6, 5, 6), (8, 6, 4, 2), {"padding": "same"}),
    "conv2d strided, dilated, grouped": (
        "conv2d",
        (2, 6, 9, 8),
        (8, 3, 3, 2),
        {"stride": (2, 3), "padding": (2, 1), "dilation": (1, 2), "groups": 2},
    ),
    "conv2d unbatched": ("conv2d", (6, 7, 6), (8, 6, 3, 3), {"padding": (1,)}),
    "conv3d": ("conv3d", (1, 4, 4, 5, 3), (6, 4, 3, 2, 3), {"stride": (1, 2, 1), "padding": 1}),
    "conv3d unbatched": ("conv3d", (4, 3, 4, 3), (2, 4, 2, 2, 2), {}),
    "conv_transpose1d": ("conv_transpose1d", (2, 6, 5), (6, 4, 4), {"stride": 3, "padding": 1, "output_padding": 2}),
    "conv_transpose2d": (
        "conv_transpose2d",
        (2, 6, 5, 4),
        (6, 2, 3, 2),
        {"stride": (2, 3), "padding": 1, "output_padding": (1, 2), "groups": 2},
    ),
    "conv_transpose2d, output padding over the stride": (
        "conv_transpose2d",
        (1, 4, 4, 3),
        (4, 3, 3, 2),
        {"dilation": 3, "output_padding": (2, 1), "padding": 1},
    ),
    "conv_transpose2d unbatched": ("conv_transpose2d", (6, 5, 4), (6, 4, 2, 2), {"stride": 2}),
    "conv_transpose3d": ("conv_transpose3d", (1, 4, 3, 2, 3), (4, 2, 2, 3, 2), {"stride": 2}),
}


class NoFallback(TorchDispatchMode):
    """Raises where PyTorch's own convolution is called."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in func.name() or "conv1d" in func.name() or "conv2d" in func.name():
            raise AssertionError(f"{func.name()} was called")
        return func(*args, **(kwargs or {}))


def leaves(
    name: str, dtype: torch.dtype = torch.float32, limit: int = 4, bias: bool = True
) -> tuple[str, list[torch.Tensor], dict[str, Any]]:
    function, shape, weight, arguments = CALLS[name]
    outputs = weight[1] * arguments.get("groups", 1) if "transpose" in function else weight[0]
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, weight, (outputs,)) if bias else (shape, weight)
    return function, [integers(s, limit, generator).to(dtype).to(DEVICE).requires_grad_() for s in shapes], arguments


def gradients(module: Any, function: str, operands: list[torch.Tensor], arguments: dict[str, Any]):
    """The output, its gradients for a gradient that depends on it, and the gradients of a penalty on those."""
    y = getattr(module, function)(*operands, **arguments)
    first = torch.autograd.grad((y * y).sum(), operands, create_graph=True)
    second = torch.autograd.grad(sum((g * g).sum() for g in first), operands)
    return y, *first, *second


@pytest.mark.parametrize("name", CALLS)
def test_forward_and_gradients_of_two_orders(name: str) -> None:
    function, operands, arguments = leaves(name, limit=2)
    with NoFallback(), settings(strict=True):
        values = gradients(ours, function, operands, arguments)
    exact = [operand.detach().cpu().double().requires_grad_() for operand in operands]
    references = gradients(theirs, function, exact, arguments)
    for index, (value, reference) in enumerate(zip(values, references, strict=True)):
        what = f"tensor {index} of {name}"
        if reference.abs().max() < 2**24:
            assert_equal(value.detach(), reference.detach(), what)
        else:
            assert_close(value, reference.detach(), reference.abs().max(), 4096, what)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    function, operands, arguments = leaves(name, dtype)
    with settings(strict=True):
        y = getattr(ours, function)(*operands, **arguments)
        values = y, *torch.autograd.grad(y, operands, torch.ones_like(y))
    exact = [operand.detach().cpu().double().requires_grad_() for operand in operands]
    reference = getattr(theirs, function)(*exact, **arguments)
    references = reference, *torch.autograd.grad(reference, exact, torch.ones_like(reference))
    for value, expected in zip(values, references, strict=True):
        assert value.dtype == dtype
        assert_equal(value.detach(), expected.detach(), name)


@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("w_format", [torch.contiguous_format, torch.channels_last], ids=["w nchw", "w nhwc"])
@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (2, 1, 5, 6), (2, 4, 1, 1), (1, 1, 1, 1), (2, 4, 1, 6), (2, 4, 6, 1)])
@pytest.mark.parametrize("outputs", [1, 6])
def test_memory_format_is_pytorchs(shape, outputs, x_format, w_format) -> None:
    x = torch.randn(shape).to(DEVICE).contiguous(memory_format=x_format).requires_grad_()
    weight = torch.randn(outputs, shape[1], 1, 1).to(DEVICE).contiguous(memory_format=w_format).requires_grad_()
    y, reference = ours.conv2d(x, weight), theirs.conv2d(x, weight)
    # The stride of an axis of size one says nothing; view() and is_contiguous() are what code depends on.
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert y.is_contiguous(memory_format=memory_format) == reference.is_contiguous(memory_format=memory_format)
    for leaf in (x, weight):
        (gradient,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)
        assert gradient.shape == leaf.shape


def test_view_after_a_convolution() -> None:
    x = torch.randn(3, 4, 5, 5, device=DEVICE)
    assert ours.conv2d(x, torch.randn(8, 4, 3, 3, device=DEVICE)).view(3, -1).shape == (3, 72)
    assert ours.conv_transpose2d(x, torch.randn(4, 8, 3, 3, device=DEVICE)).view(3, -1).shape == (3, 392)
    assert ours.conv1d(x[..., 0], torch.randn(8, 4, 3, device=DEVICE)).view(3, -1).shape == (3, 24)


@contextlib.contextmanager
def saved() -> Iterator[list[torch.Tensor]]:
    tensors: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        yield tensors


@pytest.mark.parametrize("function", ["conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("frozen", ["x", "weight", "x and weight", "bias"])
def test_only_needed_gradients_are_computed_and_saved_for(function: str, frozen: str) -> None:
    x, weight = torch.randn(2, 16, 5, 5, device=DEVICE), torch.randn(16, 16, 3, 3, device=DEVICE)
    bias = torch.randn(16, device=DEVICE)
    wanted = {"x": x, "weight": weight, "bias": bias}
    for name in list(wanted):
        if name in frozen.split(" and "):
            del wanted[name]
        else:
            wanted[name].requires_grad_()
    with saved() as tensors:
        y = getattr(ours, function)(x, weight, bias)
    pointers = {t.data_ptr() for t in tensors}
    assert (x.data_ptr() in pointers) == ("weight" in wanted)
    assert (weight.data_ptr() in pointers) == ("x" in wanted)
    assert len(pointers) == ("weight" in wanted) + ("x" in wanted)
    with record() as records:
        torch.autograd.grad(y.sum(), list(wanted.values()))
    names = {r.name for r in records} - {"split_sum_kernel"}
    kernels = {"x": "conv_gather_kernel", "weight": "conv_wgrad_kernel", "bias": "channel_sum_kernel"}
    assert names == {kernels[name] for name in wanted}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("function", ["conv2d", "conv_transpose2d"])
def test_nothing_is_saved_without_grad(mode, function: str) -> None:
    x = torch.randn(1, 16, 4, 4, device=DEVICE, requires_grad=True)
    weight = torch.randn(16, 16, 1, 1, device=DEVICE, requires_grad=True)
    with mode(), saved() as tensors, record() as records:
        y = getattr(ours, function)(x, weight)
    assert not tensors and not y.requires_grad and y.grad_fn is None
    assert [r.name for r in records] == ["conv_gather_kernel"]


X, W, T = (2, 4, 5, 5), (6, 4, 3, 3), (4, 6, 3, 3)
BAD: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...] | None, dict[str, Any]]] = {
    "channels": ("conv2d", X, (6, 3, 3, 3), None, {}),
    "channels of groups": ("conv2d", X, W, None, {"groups": 2}),
    "outputs not divisible by groups": ("conv2d", X, (5, 2, 3, 3), None, {"groups": 2}),
    "zero groups": ("conv2d", X, W, None, {"groups": 0}),
    "negative groups": ("conv2d", X, W, None, {"groups": -1}),
    "bias": ("conv2d", X, W, (5,), {}),
    "bias of two dimensions": ("conv2d", X, W, (6, 1), {}),
    "filter larger than the image": ("conv2d", X, (6, 4, 7, 3), None, {"padding": (0, 1)}),
    "dilated filter larger than the image": ("conv2d", X, W, None, {"dilation": 3}),
    "zero stride": ("conv2d", X, W, None, {"stride": 0}),
    "negative stride": ("conv2d", X, W, None, {"stride": (1, -1)}),
    "negative padding": ("conv2d", X, W, None, {"padding": -1}),
    "zero dilation": ("conv2d", X, W, None, {"dilation": 0}),
    "an empty image": ("conv2d", (2, 4, 5, 0), W, None, {"padding": 3}),
    "an empty filter": ("conv2d", X, (6, 4, 3, 0), None, {}),
    "no outputs": ("conv2d", X, (0, 4, 3, 3), None, {}),
    "three strides": ("conv2d", X, W, None, {"stride": (1, 1, 1)}),
    "no stride": ("conv2d", X, W, None, {"stride": ()}),
    "a fraction": ("conv2d", X, W, None, {"stride": 1.5}),
    "fractions": ("conv2d", X, W, None, {"padding": (1.5, 1)}),
    "a word for a stride": ("conv2d", X, W, None, {"stride": "same"}),
    "an unknown padding": ("conv2d", X, W, None, {"padding": "full"}),
    "'same' with a stride": ("conv2d", X, W, None, {"padding": "same", "stride": 2}),
    "five dimensions": ("conv2d", (1, *X), W, None, {}),
    "two dimensions": ("conv2d", (5, 5), W, None, {}),
    "a filter of three dimensions": ("conv2d", X, (6, 4, 3), None, {}),
    "conv1d channels": ("conv1d", (2, 4, 5), (6, 3, 3), None, {}),
    "conv3d channels": ("conv3d", (2, 4, 5, 5, 5), (6, 3, 3, 3, 3), None, {}),
    "transposed channels": ("conv_transpose2d", X, (3, 6, 3, 3), None, {}),
    "transposed groups": ("conv_transpose2d", X, T, None, {"groups": 3}),
    "transposed bias": ("conv_transpose2d", X, T, (4,), {}),
    "output padding": ("conv_transpose2d", X, T, None, {"output_padding": 1}),
    "output padding as large as the stride": ("conv_transpose2d", X, T, None, {"output_padding": (0, 2), "stride": 2}),
    "negative output padding": ("conv_transpose2d", X, T, None, {"output_padding": -1, "stride": 2}),
    "no output left": ("conv_transpose2d", X, T, None, {"padding": 9}),
    "transposed 'same'": ("conv_transpose2d", X, T, None, {"padding": "same"}),
    "transposed from nothing": ("conv_transpose2d", (2, 4, 5, 0), T, None, {}),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_bad_input_raises_as_pytorch_does(name: str, requires_grad: bool) -> None:
    function, shape, weight, bias, arguments = BAD[name]
    operands = [None if s is None else torch.zeros(s, device=DEVICE) for s in (shape, weight, bias)]
    operands[0].requires_grad_(requires_grad)
    with pytest.raises((RuntimeError, TypeError, ValueError)) as expected:
        getattr(theirs, function)(*operands, **arguments)
    with record() as records, pytest.raises(expected.type) as raised:
        getattr(ours, function)(*operands, **arguments)
    assert type(raised.value) is type(expected.value)
    assert not records
    message, values = str(raised.value), (*shape, *weight, *(bias or ()))
    # The sizes that do not fit, or else the argument that no size could make right.
    assert any(str(list(s)) in message for s in (shape, weight) if s) or any(key in message for key in arguments), (
        values
    )


@pytest.mark.parametrize("other", ["weight", "bias"])
def test_mixed_dtypes_raise(other: str) -> None:
    operands = {"x": torch.zeros(X), "weight": torch.zeros(W), "bias": torch.zeros(6)}
    operands = {name: t.to(DEVICE) for name, t in operands.items()}
    operands[other] = operands[other].half()
    with record() as records, pytest.raises(RuntimeError, match=r"float16.*\[2, 4, 5, 5\]"):
        ours.conv2d(*operands.values())
    assert not records


def test_mixed_devices_raise() -> None:
    x, weight = torch.zeros(X, device=DEVICE), torch.zeros(W, device="meta")
    with pytest.raises(RuntimeError, match=r"same device.*\[2, 4, 5, 5\].*meta"):
        ours.conv2d(x, weight)


@pytest.mark.parametrize("operand", [None, 3, [1.0]])
def test_what_is_no_tensor_is_a_type_error(operand: Any) -> None:
    with pytest.raises(TypeError):
        ours.conv2d(torch.zeros(X, device=DEVICE), operand)
    with pytest.raises(TypeError):
        ours.conv2d(operand, torch.zeros(W, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64], ids=str)
def test_other_dtypes_are_pytorchs(dtype: torch.dtype) -> None:
    x, weight = torch.ones(X).to(dtype), torch.ones(W).to(dtype)
    with settings(strict=True), record() as records:
        assert torch.equal(ours.conv2d(x, weight), theirs.conv2d(x, weight))
    assert not records
    assert str(dtype) in (ours.why_not_served(x) or "")


@pytest.mark.parametrize("function", ["conv2d", "conv_transpose2d"])
def test_meta_tensors_are_pytorchs(function: str) -> None:
    x, weight = torch.empty(2, 6, 7, 6, device="meta"), torch.empty(6, 6, 3, 3, device="meta")
    assert getattr(ours, function)(x, weight).shape == getattr(theirs, function)(x, weight).shape
    assert ours.why_not_served(x) == "its device is meta"


@pytest.mark.parametrize("function", ["conv2d", "conv_transpose2d"])
def test_empty_batch(function: str) -> None:
    x = torch.zeros(0, 6, 5, 4, device=DEVICE, requires_grad=True)
    weight = torch.ones(6, 6, 3, 3, device=DEVICE, requires_grad=True)
    bias = torch.ones(6, device=DEVICE, requires_grad=True)
    y = getattr(ours, function)(x, weight, bias)
    assert y.shape == getattr(theirs, function)(x, weight, bias).shape
    y.sum().backward()
    assert x.grad.shape == x.shape and not weight.grad.any() and not bias.grad.any()


def test_a_call_without_a_kernel_runs_pytorchs_op_or_raises(monkeypatch, caplog) -> None:
    from fastconv.autograd import operators
    from fastconv.kernels import dispatch
    from fastconv.kernels.families import conv_gather
    from fastconv.kernels.ops import call
    from fastconv.kernels.problem import conv

    # Another test of this process may have had the line of the log.
    operators._say_once.cache_clear()
    monkeypatch.setattr(call, "_calls", {})
    refusing = replace(conv_gather.FAMILY, why_not=lambda *a: "not today")
    monkeypatch.setattr(dispatch, "FAMILIES", dict.fromkeys(conv.DIRECTIONS, (refusing,)))
    for name in ("conv2d", "conv2d uneven same", "conv2d strided, dilated, grouped", "conv_transpose2d", "conv1d"):
        function, operands, arguments = leaves(name)
        with caplog.at_level("INFO", logger="fastconv"):
            values = gradients(ours, function, operands, arguments)
        for value, reference in zip(values, gradients(theirs, function, operands, arguments), strict=True):
            torch.testing.assert_close(value, reference)
        with settings(strict=True), pytest.raises(RuntimeError, match="not today"):
            getattr(ours, function)(*operands, **arguments)
    assert "not today" in caplog.text


def test_backward_on_another_thread_is_strict_too(monkeypatch) -> None:
    """Autograd runs a GPU's backward on threads that see no context of the user's."""
    from fastconv.kernels import dispatch
    from fastconv.kernels.families import conv_gather
    from fastconv.kernels.ops import call

    monkeypatch.setattr(call, "_calls", {})
    refusing = replace(conv_gather.FAMILY, why_not=lambda *a: "not today")
    families = {"fprop": (conv_gather.FAMILY,), "dgrad": (refusing,), "wgrad": (refusing,)}
    monkeypatch.setattr(dispatch, "FAMILIES", families)
    x = torch.randn(1, 16, 4, 4, device=DEVICE, requires_grad=True)
    raised: list[Exception] = []

    def backward() -> None:
        try:
            ours.conv2d(x, torch.ones(16, 16, 1, 1, device=DEVICE)).sum().backward()
        except RuntimeError as error:
            raised.append(error)

    with settings(strict=True):
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    assert len(raised) == 1 and "not today" in str(raised[0])
    backward()
    assert len(raised) == 1 and x.grad is not None


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_fp32_precision_follows_pytorch(precision: str, set_fp32_precision) -> None:
    set_fp32_precision(precision)
    x = torch.ones(1, 16, 4, 4, device=DEVICE, requires_grad=True)
    weight = torch.ones(16, 16, 3, 3, device=DEVICE, requires_grad=True)
    with record() as records:
        ours.conv2d(x, weight).sum().backward()
    constants = [r.launch.constants for r in records if "PRECISION" in r.launch.constants]
    assert len(constants) == 3 and all(c["PRECISION"] == precision for c in constants)


def test_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        integers(shape, 4, generator).float().to(DEVICE).requires_grad_()
        for shape in ((2, 16, 5, 5), (16, 16, 3, 3), (16,))
    )
    with torch.autocast(DEVICE, torch.bfloat16):
        y = ours.conv2d(x, weight, bias)
        z = ours.conv_transpose2d(y, weight)
        # Autocast does not change fp64, which PyTorch computes.
        assert ours.conv2d(x.double(), weight.double()).dtype == torch.float64
    assert y.dtype == z.dtype == torch.bfloat16
    assert_equal(y.detach(), theirs.conv2d(*(t.detach().cpu().double() for t in (x, weight, bias))), "autocast")
    z.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32


def test_gradient_penalty_through_a_sum() -> None:
    """A penalty on the input's gradient reaches the weight, though the head is a plain sum."""
    x = torch.randn(2, 4, 5, 5, device=DEVICE, requires_grad=True)
    weight = torch.randn(6, 4, 3, 3, device=DEVICE, requires_grad=True)

    def penalty(module: Any) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(module.conv2d(x, weight).sum(), x, create_graph=True)
        return torch.autograd.grad((gradient**2).sum(), weight)[0]

    torch.testing.assert_close(penalty(ours), penalty(theirs), rtol=1e-4, atol=1e-3)


def test_threads() -> None:
    x, weight = torch.randn(2, 16, 5, 5, device=DEVICE), torch.randn(16, 16, 3, 3, device=DEVICE, requires_grad=True)
    wrong: list[Any] = []
    expected = torch.autograd.grad(ours.conv2d(x, weight).sum(), weight)[0]

    def work() -> None:
        for _ in range(3):
            if not torch.equal(torch.autograd.grad(ours.conv2d(x, weight).sum(), weight)[0], expected):
                wrong.append("differs")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


OPERATORS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "conv_fprop": lambda: (
        torch.randn(2, 6, 5, 5, device=DEVICE),
        torch.randn(4, 3, 3, 3, device=DEVICE),
        torch.randn(4, device=DEVICE),
        *([2, 1], [1, 0, 1, 1], [1, 1], 2),
    ),
    "conv_dgrad": lambda: (
        torch.randn(2, 4, 3, 5, device=DEVICE).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 3, 3, 3, device=DEVICE),
        None,
        *([5, 7], [2, 1], [1, 0], [1, 1], 2, True),
    ),
    "conv_wgrad": lambda: (
        torch.randn(2, 6, 5, 7, device=DEVICE),
        torch.randn(2, 4, 3, 5, device=DEVICE),
        *([3, 3], [2, 1], [1, 0], [1, 1], 2, False),
    ),
    "channel_sum": lambda: (torch.randn(2, 4, 3, 5, device=DEVICE),),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    """PyTorch's own check of an operator: schema, fakes of the right strides, tracing with symbolic sizes."""
    operator = getattr(torch.ops.fastconv, name).default
    torch.library.opcheck(operator, OPERATORS[name]())


def test_transforms_and_forward_mode_run_pytorchs_op() -> None:
    """An autograd.Function of ours would drop the tangent without a word."""
    x, weight = torch.randn(2, 4, 6, 6, device=DEVICE), torch.randn(5, 4, 3, 3, device=DEVICE)

    def net(functions: Any, x: torch.Tensor) -> torch.Tensor:
        return functions.max_pool2d(functions.conv2d(x, weight, padding=1), 2).sin()

    tangent = torch.randn_like(x)
    expected = torch.func.jvp(partial(net, theirs), (x,), (tangent,))[1]
    with settings(strict=True), record() as launches:
        torch.testing.assert_close(torch.func.jvp(partial(net, ours), (x,), (tangent,))[1], expected)
        with forward_ad.dual_level():
            dual = net(ours, forward_ad.make_dual(x, tangent))
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
        per_image = torch.func.vmap(torch.func.grad(lambda image: net(ours, image[None]).sum()))
        reference = torch.func.vmap(torch.func.grad(lambda image: net(theirs, image[None]).sum()))
        torch.testing.assert_close(per_image(x), reference(x))
        assert not launches
        net(ours, x)
        assert launches
