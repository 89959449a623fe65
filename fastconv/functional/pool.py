"""torch.nn.functional's pools: the same names, signatures, formats and errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from fastconv.arguments import Ints, boolean, expand, integer, why_not_served
from fastconv.autograd.pool import Geometry, average_pool, lp_pool, max_pool
from fastconv.kernels.ops.pool import ADAPTIVE
from fastconv.kernels.problem.windows import output_size


def max_pool1d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """As torch.nn.functional.max_pool1d, errors too: [N, C, W] or [C, W] -> [N, C, Q], and its int64 indices if asked
    for. The last NaN of a window wins, else its first maximum."""
    return _max_pool(1, max_pool1d, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """As torch.nn.functional.max_pool2d, errors too: [N, C, H, W] or [C, H, W] -> [N, C, P, Q], and its int64 indices
    if asked for. The last NaN of a window wins, else its first maximum."""
    return _max_pool(2, max_pool2d, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool3d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """As torch.nn.functional.max_pool3d, errors too: [N, C, D, H, W] or [C, D, H, W] -> [N, C, O, P, Q], and its int64
    indices if asked for. The last NaN of a window wins, else its first maximum."""
    return _max_pool(3, max_pool3d, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def avg_pool1d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """As torch.nn.functional.avg_pool1d, errors too: [N, C, W] or [C, W] -> [N, C, Q], summed in fp32."""
    return _avg_pool(1, avg_pool1d, input, kernel_size, stride, padding, ceil_mode, count_include_pad)


def avg_pool2d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """As torch.nn.functional.avg_pool2d, errors too: [N, C, H, W] or [C, H, W] -> [N, C, P, Q], summed in fp32."""
    arguments = kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    return _avg_pool(2, avg_pool2d, input, *arguments)


def avg_pool3d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """As torch.nn.functional.avg_pool3d, errors too: [N, C, D, H, W] or [C, D, H, W] -> [N, C, O, P, Q]; fp32 sums."""
    arguments = kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    return _avg_pool(3, avg_pool3d, input, *arguments)


def adaptive_max_pool1d(input: Tensor, output_size: Ints, return_indices: bool = False) -> Any:
    """As torch.nn.functional.adaptive_max_pool1d, errors too: [N, C, W] or [C, W] -> [N, C, *output_size], and its
    int64 indices if asked for."""
    return _adaptive_max_pool(1, adaptive_max_pool1d, input, output_size, return_indices)


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """As torch.nn.functional.adaptive_max_pool2d, errors too: [N, C, H, W] or [C, H, W] -> [N, C, *output_size], and
    its int64 indices if asked for."""
    return _adaptive_max_pool(2, adaptive_max_pool2d, input, output_size, return_indices)


def adaptive_max_pool3d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """As torch.nn.functional.adaptive_max_pool3d, errors too: [N, C, D, H, W] or [C, D, H, W] -> [N, C, *output_size],
    and its int64 indices if asked for."""
    return _adaptive_max_pool(3, adaptive_max_pool3d, input, output_size, return_indices)


def adaptive_avg_pool1d(input: Tensor, output_size: Ints) -> Tensor:
    """As torch.nn.functional.adaptive_avg_pool1d, errors too: [N, C, W] or [C, W] -> [N, C, *output_size], summed in
    fp32."""
    return _adaptive_avg_pool(1, adaptive_avg_pool1d, input, output_size)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """As torch.nn.functional.adaptive_avg_pool2d, errors too: [N, C, H, W] or [C, H, W] -> [N, C, *output_size], summed
    in fp32."""
    return _adaptive_avg_pool(2, adaptive_avg_pool2d, input, output_size)


def adaptive_avg_pool3d(input: Tensor, output_size: Any) -> Tensor:
    """As torch.nn.functional.adaptive_avg_pool3d, errors too: [N, C, D, H, W] or [C, D, H, W] -> [N, C, *output_size],
    summed in fp32."""
    return _adaptive_avg_pool(3, adaptive_avg_pool3d, input, output_size)


def lp_pool1d(
    input: Tensor, norm_type: float, kernel_size: Ints, stride: Ints | None = None, ceil_mode: bool = False
) -> Tensor:
    """As torch.nn.functional.lp_pool1d, errors too: [N, C, W] or [C, W] -> [N, C, Q], summed in fp32."""
    return _lp_pool(1, lp_pool1d, max_pool1d, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool2d(
    input: Tensor, norm_type: float, kernel_size: Ints, stride: Ints | None = None, ceil_mode: bool = False
) -> Tensor:
    """As torch.nn.functional.lp_pool2d, errors too: [N, C, H, W] or [C, H, W] -> [N, C, P, Q], summed in fp32."""
    return _lp_pool(2, lp_pool2d, max_pool2d, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool3d(
    input: Tensor, norm_type: float, kernel_size: Ints, stride: Ints | None = None, ceil_mode: bool = False
) -> Tensor:
    """As torch.nn.functional.lp_pool3d, errors too: [N, C, D, H, W] or [C, D, H, W] -> [N, C, O, P, Q]; fp32 sums."""
    return _lp_pool(3, lp_pool3d, max_pool3d, input, norm_type, kernel_size, stride, ceil_mode)


def _max_pool(rank: int, ours: Any, x: Tensor, *arguments: Any) -> Any:
    if has_torch_function_unary(x):
        return handle_torch_function(ours, (x,), x, *arguments)
    if not isinstance(x, Tensor) or why_not_served(x):
        return getattr(torch.nn.functional, ours.__name__)(x, *arguments)
    kernel_size, stride, padding, dilation, ceil_mode, return_indices = arguments
    geometry, size = _windows(ours.__name__, rank, x, kernel_size, stride, padding, dilation, ceil_mode)
    y, indices = max_pool(_batched(x, rank), size, geometry, bool(return_indices))
    return _like(x, rank, y, indices)


def _avg_pool(rank: int, ours: Any, x: Tensor, kernel_size: Any, stride: Any, padding: Any, *options: Any) -> Tensor:
    if has_torch_function_unary(x):
        return handle_torch_function(ours, (x,), x, kernel_size, stride, padding, *options)
    if not isinstance(x, Tensor) or why_not_served(x):
        # torch takes no None for a stride.
        return getattr(torch.nn.functional, ours.__name__)(
            x, kernel_size, kernel_size if stride is None else stride, padding, *options
        )
    ceil_mode, include_padding, divisor = (*options, None)[:3]
    include_padding = boolean("count_include_pad", include_padding)
    if divisor is not None and type(divisor) is not int:
        divisor = integer("divisor_override", divisor)
    if divisor == 0:
        raise RuntimeError(f"divisor must be not zero, but got divisor_override=0 for input of size: {list(x.shape)}")
    geometry, size = _windows(ours.__name__, rank, x, kernel_size, stride, padding, 1, ceil_mode)
    return _like(x, rank, average_pool(_batched(x, rank), size, geometry, include_padding, divisor or 0))


def _adaptive_max_pool(rank: int, ours: Any, x: Tensor, output_size: Any, return_indices: bool) -> Any:
    if has_torch_function_unary(x):
        return handle_torch_function(ours, (x,), x, output_size, return_indices)
    if not isinstance(x, Tensor) or why_not_served(x):
        return getattr(torch.nn.functional, ours.__name__)(x, output_size, return_indices)
    size = _adaptive_size(ours.__name__, rank, x, output_size, x.shape[1:])
    y, indices = max_pool(_batched(x, rank), size, ADAPTIVE, bool(return_indices))
    return _like(x, rank, y, indices)


def _adaptive_avg_pool(rank: int, ours: Any, x: Tensor, output_size: Any) -> Tensor:
    if has_torch_function_unary(x):
        return handle_torch_function(ours, (x,), x, output_size)
    if not isinstance(x, Tensor) or why_not_served(x):
        return getattr(torch.nn.functional, ours.__name__)(x, output_size)
    # PyTorch's pools of one and two axes take inputs without channels.
    full = x.shape[1:] if rank == 3 else x.shape[-rank:]
    size = _adaptive_size(ours.__name__, rank, x, output_size, full)
    return _like(x, rank, average_pool(_batched(x, rank), size, ADAPTIVE, True, 0))


def _lp_pool(
    rank: int,
    ours: Any,
    largest: Callable[..., Tensor],
    x: Tensor,
    norm_type: float,
    kernel_size: Any,
    stride: Any,
    ceil_mode: bool,
) -> Tensor:
    if has_torch_function_unary(x):
        return handle_torch_function(ours, (x,), x, norm_type, kernel_size, stride, ceil_mode)
    # A norm may be a tensor, with a gradient.
    if not isinstance(x, Tensor) or isinstance(norm_type, Tensor) or why_not_served(x):
        return getattr(torch.nn.functional, ours.__name__)(x, norm_type, kernel_size, stride, ceil_mode)
    if isinstance(norm_type, (str, bytes)):
        raise TypeError(f"{ours.__name__}: norm_type must be a number, but got {norm_type!r}")
    if norm_type == float("inf"):
        return largest(x.abs(), kernel_size, stride, 0, 1, ceil_mode)
    if norm_type == -float("inf"):
        return -largest(-x.abs(), kernel_size, stride, 0, 1, ceil_mode)
    if norm_type == 0:
        raise ZeroDivisionError(f"{ours.__name__}: norm_type must not be zero, for input of size: {list(x.shape)}")
    if x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        x = x.float()  # as autocast has powers
    if rank > 1 and isinstance(kernel_size, Sequence) and len(kernel_size) != rank:
        raise ValueError(
            f"{ours.__name__}: expected {rank} values of kernel_size, but got {kernel_size!r} for {list(x.shape)}"
        )
    (window, stride, *_), size = _windows(ours.__name__, rank, x, kernel_size, stride, 0, 1, ceil_mode)
    return _like(x, rank, lp_pool(_batched(x, rank), size, window, stride, float(norm_type)))


def _windows(
    name: str, rank: int, x: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> tuple[Geometry, tuple[int, ...]]:
    """(geometry, output size) of a pool. Raises as torch does, with the shapes in the message."""
    _check_rank(name, rank, x)
    ceil_mode = boolean("ceil_mode", ceil_mode)
    of = "the pooled dimensions"
    window = expand("kernel_size", kernel_size, rank, of)
    if stride is None or (isinstance(stride, Sequence) and not stride):
        stride = window
    stride, padding = expand("stride", stride, rank, of), expand("padding", padding, rank, of)
    dilation = expand("dilation", dilation, rank, of)
    for what, values, least in (
        ("kernel size", window, 1),
        ("stride", stride, 1),
        ("dilation", dilation, 1),
        ("pad", padding, 0),
    ):
        if min(values) < least:
            bound = "non-negative" if least == 0 else "greater than zero"
            raise RuntimeError(f"{name}: {what} should be {bound}, but got {list(values)} {_where(x)}")
    if any(2 * pad > size for pad, size in zip(padding, window, strict=True)):
        raise RuntimeError(
            f"{name}: pad should be at most half of kernel size, but got pad={list(padding)} and "
            f"kernel_size={list(window)} {_where(x)}"
        )
    if any(size == 0 for size in x.shape[-rank - 1 :]):
        raise RuntimeError(f"{name}: Expected a tensor with optional 0 dim batch size, but got: {list(x.shape)}")
    if rank == 3 and not name.startswith("max") and any(h < r for h, r in zip(x.shape[-rank:], window, strict=True)):
        raise RuntimeError(f"{name}: input image smaller than kernel size {list(window)} {_where(x)}")
    size = tuple(map(_output_size, x.shape[-rank:], window, stride, padding, dilation, (ceil_mode,) * rank))
    if any(p < 1 for p in size):
        raise RuntimeError(
            f"{name}: Given input size: {list(x.shape)}. Calculated output size: {list(size)}. Output size is too small"
        )
    return (window, stride, padding, dilation), size


def _where(x: Tensor) -> str:
    return f"for input of size: {list(x.shape)}"


def _output_size(size: int, window: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """torch's output size: with ceil_mode the last window may reach past the input, but not begin there."""
    outputs = output_size(size + (stride - 1 if ceil_mode else 0), window, stride, 2 * padding, dilation)
    return outputs - 1 if ceil_mode and (outputs - 1) * stride >= size + padding else outputs


def _adaptive_size(name: str, rank: int, x: Tensor, output_size: Any, full: Sequence[int]) -> tuple[int, ...]:
    """The output size as a tuple of ``rank``, None taken from the input; ``full``: the axes that must not be empty."""
    if rank > 1 and hasattr(output_size, "__len__") and not isinstance(output_size, str):
        output_size = list(output_size)
        if len(output_size) >= x.dim():
            raise ValueError(
                f"{name}: Input dimension should be at least {len(output_size) + 1} for output_size="
                f"{output_size}, but got input of size: {list(x.shape)}"
            )
        sizes = zip(output_size, x.shape[-rank:], strict=False)
        output_size = [h if p is None else p for p, h in sizes] + output_size[rank:]
        if len(output_size) != rank:
            raise RuntimeError(f"{name}: output_size must be {rank}, but got {output_size} for input {list(x.shape)}")
    _check_rank(name, rank, x)
    size = expand("output_size", output_size, rank, "the pooled dimensions")
    if any(p < 0 for p in size):
        raise RuntimeError(f"{name}: output_size must not be negative, but got {list(size)} for input {list(x.shape)}")
    if any(h == 0 for h in full):
        raise RuntimeError(
            f"{name}: Expected input to have non-zero size for non-batch dimensions, but got: {list(x.shape)}"
        )
    return size


def _check_rank(name: str, rank: int, x: Tensor) -> None:
    if x.dim() not in (rank + 1, rank + 2):
        # PyTorch's average pools of planes ask for a missing axis.
        error = IndexError if x.dim() < 3 and name in ("avg_pool2d", "lp_pool2d") else RuntimeError
        raise error(
            f"{name}: Expected {rank + 1}D or {rank + 2}D (batch mode) tensor, but got input of size: {list(x.shape)}"
        )


def _batched(x: Tensor, rank: int) -> Tensor:
    return x if x.dim() == rank + 2 else x.unsqueeze(0)


def _like(x: Tensor, rank: int, y: Tensor, indices: Tensor | None = None) -> Any:
    """``y``, with a batch axis if ``x`` has one, and ``indices`` if there are any."""
    if x.dim() == rank + 1:
        y, indices = y.squeeze(0), None if indices is None else indices.squeeze(0)
    return y if indices is None else (y, indices)
