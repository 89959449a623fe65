"""torch.nn's pools, computed by ``fastconv.functional``: subclasses that add no state, as ``fastconv.nn.conv``'s are.

``torch.fx`` traces into them and finds one call of a function in ``fastconv.functional``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastconv import functional
from fastconv.nn.exact import exact
from fastconv.nn.patches import patched_beneath


class MaxPool1d(torch.nn.MaxPool1d):
    """As torch.nn.MaxPool1d: [N, C, W] or [C, W] -> [N, C, Q]."""

    def forward(self, input: Tensor) -> Any:
        if patched_beneath(MaxPool1d):
            return super().forward(input)
        window = self.kernel_size, self.stride, self.padding, self.dilation
        return functional.max_pool1d(input, *window, self.ceil_mode, self.return_indices)


class MaxPool2d(torch.nn.MaxPool2d):
    """As torch.nn.MaxPool2d: [N, C, H, W] or [C, H, W] -> [N, C, P, Q]."""

    def forward(self, input: Tensor) -> Any:
        if patched_beneath(MaxPool2d):
            return super().forward(input)
        window = self.kernel_size, self.stride, self.padding, self.dilation
        return functional.max_pool2d(input, *window, self.ceil_mode, self.return_indices)


class MaxPool3d(torch.nn.MaxPool3d):
    """As torch.nn.MaxPool3d: [N, C, D, H, W] or [C, D, H, W] -> [N, C, O, P, Q]."""

    def forward(self, input: Tensor) -> Any:
        if patched_beneath(MaxPool3d):
            return super().forward(input)
        window = self.kernel_size, self.stride, self.padding, self.dilation
        return functional.max_pool3d(input, *window, self.ceil_mode, self.return_indices)


class AvgPool1d(torch.nn.AvgPool1d):
    """As torch.nn.AvgPool1d: [N, C, W] or [C, W] -> [N, C, Q]."""

    def forward(self, input: Tensor) -> Tensor:
        if patched_beneath(AvgPool1d):
            return super().forward(input)
        counting = self.ceil_mode, self.count_include_pad
        return functional.avg_pool1d(input, self.kernel_size, self.stride, self.padding, *counting)


class AvgPool2d(torch.nn.AvgPool2d):
    """As torch.nn.AvgPool2d: [N, C, H, W] or [C, H, W] -> [N, C, P, Q]."""

    def forward(self, input: Tensor) -> Tensor:
        if patched_beneath(AvgPool2d):
            return super().forward(input)
        counting = self.ceil_mode, self.count_include_pad, self.divisor_override
        return functional.avg_pool2d(input, self.kernel_size, self.stride, self.padding, *counting)


class AvgPool3d(torch.nn.AvgPool3d):
    """As torch.nn.AvgPool3d: [N, C, D, H, W] or [C, D, H, W] -> [N, C, O, P, Q]."""

    def forward(self, input: Tensor) -> Tensor:
        if patched_beneath(AvgPool3d):
            return super().forward(input)
        counting = self.ceil_mode, self.count_include_pad, self.divisor_override
        return functional.avg_pool3d(input, self.kernel_size, self.stride, self.padding, *counting)


class AdaptiveMaxPool1d(torch.nn.AdaptiveMaxPool1d):
    """As torch.nn.AdaptiveMaxPool1d: [N, C, W] or [C, W] -> [N, C, *output_size]."""

    def forward(self, input: Tensor) -> Any:
        if patched_beneath(AdaptiveMaxPool1d):
            return super().forward(input)
        return functional.adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """As torch.nn.AdaptiveMaxPool2d: [N, C, H, W] or [C, H, W] -> [N, C, *output_size]."""

    def forward(self, input: Tensor) -> Any:
        if patched_beneath(AdaptiveMaxPool2d):
            return super().forward(input)
        return functional.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool3d(torch.nn.AdaptiveMaxPool3d):
    """As torch.nn.AdaptiveMaxPool3d: [N, C, D, H, W] or [C, D, H, W] -> [N, C, *output_size]."""

    def forward(self, input: Tensor) -> Any:
        if patched_beneath(AdaptiveMaxPool3d):
            return super().forward(input)
        return functional.adaptive_max_pool3d(input, self.output_size, self.return_indices)


class AdaptiveAvgPool1d(torch.nn.AdaptiveAvgPool1d):
    """As torch.nn.AdaptiveAvgPool1d: [N, C, W] or [C, W] -> [N, C, *output_size]."""

    def forward(self, input: Tensor) -> Tensor:
        if patched_beneath(AdaptiveAvgPool1d):
            return super().forward(input)
        return functional.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """As torch.nn.AdaptiveAvgPool2d: [N, C, H, W] or [C, H, W] -> [N, C, *output_size]."""

    def forward(self, input: Tensor) -> Tensor:
        if patched_beneath(AdaptiveAvgPool2d):
            return super().forward(input)
        return functional.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveAvgPool3d(torch.nn.AdaptiveAvgPool3d):
    """As torch.nn.AdaptiveAvgPool3d: [N, C, D, H, W] or [C, D, H, W] -> [N, C, *output_size]."""

    def forward(self, input: Tensor) -> Tensor:
        if patched_beneath(AdaptiveAvgPool3d):
            return super().forward(input)
        return functional.adaptive_avg_pool3d(input, self.output_size)


class LPPool1d(torch.nn.LPPool1d):
    """As torch.nn.LPPool1d: [N, C, W] or [C, W] -> [N, C, Q]."""

    def forward(self, input: Tensor) -> Tensor:
        if patched_beneath(LPPool1d):
            return super().forward(input)
        return functional.lp_pool1d(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)


class LPPool2d(torch.nn.LPPool2d):
    """As torch.nn.LPPool2d: [N, C, H, W] or [C, H, W] -> [N, C, P, Q]."""

    def forward(self, input: Tensor) -> Tensor:
        if patched_beneath(LPPool2d):
            return super().forward(input)
        return functional.lp_pool2d(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)


class LPPool3d(torch.nn.LPPool3d):
    """As torch.nn.LPPool3d: [N, C, D, H, W] or [C, D, H, W] -> [N, C, O, P, Q]."""

    def forward(self, input: Tensor) -> Tensor:
        if patched_beneath(LPPool3d):
            return super().forward(input)
        return functional.lp_pool3d(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)


_LAYERS = (
    *(MaxPool1d, MaxPool2d, MaxPool3d),
    *(AvgPool1d, AvgPool2d, AvgPool3d),
    *(AdaptiveMaxPool1d, AdaptiveMaxPool2d, AdaptiveMaxPool3d),
    *(AdaptiveAvgPool1d, AdaptiveAvgPool2d, AdaptiveAvgPool3d),
    *(LPPool1d, LPPool2d, LPPool3d),
)
exact(*_LAYERS)
# So that ``torch.load(weights_only=True)`` takes the layers wherever it takes torch.nn's.
torch.serialization.add_safe_globals([*_LAYERS])
