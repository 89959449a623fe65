"""torch.nn's convolution layers, computed by ``fastconv.functional``.

Each is a subclass of torch.nn's class that adds no state, so that an instance becomes the other by a change of its
``__class__`` (``fastconv.convert``), and pickles, state_dicts and reprs of the two are alike. ``torch.fx`` keeps only
torch.nn's own classes as leaves: it traces into fastconv's and finds one call of ``fastconv.functional``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fastconv import functional
from fastconv.nn.exact import exact, refuse_tracer, unquantised
from fastconv.nn.patches import patched_beneath


def _forward(function: Callable[..., Tensor], layer: _ConvNd, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not isinstance(x, Tensor):
        refuse_tracer(x)
    padding: str | int | tuple[int, ...] = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = torch.nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    return function(x, weight, bias, layer.stride, padding, layer.dilation, layer.groups)


def _forward_transposed(
    function: Callable[..., Tensor], layer: Any, x: Tensor, output_size: list[int] | None
) -> Tensor:
    if not isinstance(x, Tensor):
        refuse_tracer(x)
    if output_size is not None:
        return conv_transpose_to(
            x, layer.weight, layer.bias, output_size, layer.stride, layer.padding, layer.groups, layer.dilation
        )
    return function(
        x, layer.weight, layer.bias, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
    )


# A leaf for torch.fx, because the output_padding that gives the size depends on the input's size.
@torch.fx.wrap
def conv_transpose_to(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_size: list[int],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int,
    dilation: tuple[int, ...],
) -> Tensor:
    """The transposed convolution with the output_padding that gives ``output_size`` (with or without the leading axes).

    x [N, K, spatial] or [K, spatial], weight [K, C/groups, filter], bias [C]. Raises ValueError, as torch.nn's layers
    do, if no output_padding smaller than the stride gives that size.
    """
    rank = weight.dim() - 2
    # Given a size, the method reads nothing of its layer.
    solve: Any = _ConvTransposeNd._output_padding
    output_padding = solve(None, x, output_size, stride, padding, weight.shape[2:], rank, dilation)
    function = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[rank - 1]
    return function(x, weight, bias, stride, padding, output_padding, groups, dilation)


class Conv1d(torch.nn.Conv1d):
    """As torch.nn.Conv1d: [N, C, W] or [C, W] -> [N, K, Q]."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if patched_beneath(Conv1d):
            return super()._conv_forward(input, weight, bias)
        return _forward(functional.conv1d, self, input, weight, bias)


class Conv2d(torch.nn.Conv2d):
    """As torch.nn.Conv2d: [N, C, H, W] or [C, H, W] -> [N, K, P, Q]."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if patched_beneath(Conv2d):
            return super()._conv_forward(input, weight, bias)
        return _forward(functional.conv2d, self, input, weight, bias)


class Conv3d(torch.nn.Conv3d):
    """As torch.nn.Conv3d: [N, C, D, H, W] or [C, D, H, W] -> [N, K, O, P, Q]."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if patched_beneath(Conv3d):
            return super()._conv_forward(input, weight, bias)
        return _forward(functional.conv3d, self, input, weight, bias)


class ConvTranspose1d(torch.nn.ConvTranspose1d):
    """As torch.nn.ConvTranspose1d: [N, K, Q] or [K, Q] -> [N, C, W]."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if patched_beneath(ConvTranspose1d):
            return super().forward(input, output_size)
        return _forward_transposed(functional.conv_transpose1d, self, input, output_size)


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """As torch.nn.ConvTranspose2d: [N, K, P, Q] or [K, P, Q] -> [N, C, H, W]."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if patched_beneath(ConvTranspose2d):
            return super().forward(input, output_size)
        return _forward_transposed(functional.conv_transpose2d, self, input, output_size)


class ConvTranspose3d(torch.nn.ConvTranspose3d):
    """As torch.nn.ConvTranspose3d: [N, K, O, P, Q] or [K, O, P, Q] -> [N, C, D, H, W]."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if patched_beneath(ConvTranspose3d):
            return super().forward(input, output_size)
        return _forward_transposed(functional.conv_transpose3d, self, input, output_size)


# The lazy classes take in_channels from the first input, and become the class of their rank then.


class LazyConv1d(torch.nn.LazyConv1d, Conv1d):  # type: ignore[misc]
    """As torch.nn.LazyConv1d; becomes Conv1d."""

    cls_to_become = Conv1d


class LazyConv2d(torch.nn.LazyConv2d, Conv2d):  # type: ignore[misc]
    """As torch.nn.LazyConv2d; becomes Conv2d."""

    cls_to_become = Conv2d


class LazyConv3d(torch.nn.LazyConv3d, Conv3d):  # type: ignore[misc]
    """As torch.nn.LazyConv3d; becomes Conv3d."""

    cls_to_become = Conv3d


class LazyConvTranspose1d(torch.nn.LazyConvTranspose1d, ConvTranspose1d):  # type: ignore[misc]
    """As torch.nn.LazyConvTranspose1d; becomes ConvTranspose1d."""

    cls_to_become = ConvTranspose1d


class LazyConvTranspose2d(torch.nn.LazyConvTranspose2d, ConvTranspose2d):  # type: ignore[misc]
    """As torch.nn.LazyConvTranspose2d; becomes ConvTranspose2d."""

    cls_to_become = ConvTranspose2d


class LazyConvTranspose3d(torch.nn.LazyConvTranspose3d, ConvTranspose3d):  # type: ignore[misc]
    """As torch.nn.LazyConvTranspose3d; becomes ConvTranspose3d."""

    cls_to_become = ConvTranspose3d


_LAYERS = Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
_LAZY = LazyConv1d, LazyConv2d, LazyConv3d, LazyConvTranspose1d, LazyConvTranspose2d, LazyConvTranspose3d
exact(*_LAYERS)
unquantised(*_LAYERS)
# So that ``torch.load(weights_only=True)`` takes the layers wherever it takes torch.nn's.
torch.serialization.add_safe_globals([*_LAYERS, *_LAZY])
