"""ResNet-18's two kinds of block on a crop of a photograph, forward and backward, against fp64."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

import fastconv
from fastconv.benchmarks.models import torchvision
from fastconv.benchmarks.report.results import Part
from fastconv.kernels.launch import launch
from fastconv.measuring.accuracy import YARDSTICK, Tensors, max_error, norm_error, tolerance

CROP = 224  # side of the photograph, as of ImageNet's images; the stem makes 56x56 pixels of it
SEED = 0


def photograph() -> torch.Tensor:
    """A crop of scikit-learn's photograph of a temple, normalised as ImageNet's are: ``[1, 3, CROP, CROP]``, fp64."""
    from sklearn.datasets import load_sample_image

    pixels = torch.from_numpy(load_sample_image("china.jpg").copy())[100 : 100 + CROP, 200 : 200 + CROP]
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((pixels / 255 - mean) / deviation).permute(2, 0, 1)[None].double()


def run(dtypes: list[torch.dtype], tick: Callable[[], None] = lambda: None) -> list[Part]:
    """One part for each kind of block; ``tick`` is called after each of the ``2 * len(dtypes)`` comparisons."""
    torch.manual_seed(SEED)
    network = torchvision().models.resnet18(weights=None).double().train()
    with torch.no_grad():
        features = network.maxpool(network.relu(network.bn1(network.conv1(photograph()))))
    kinds = (("identity", network.layer1[0]), ("downsample", network.layer2[0]))
    return [_part(kind, block, features, dtypes, tick) for kind, block in kinds]


def _part(
    kind: str, block: nn.Module, features: torch.Tensor, dtypes: list[torch.dtype], tick: Callable[[], None]
) -> Part:
    rows, launches = [], Counter[str]()
    for dtype in dtypes:
        # Every side computes with the same rounded numbers, so errors are the arithmetic's.
        rounded, x = copy.deepcopy(block).to(dtype), features.to(dtype)
        seed = torch.randn(block(features).shape, generator=torch.Generator().manual_seed(SEED)).to(dtype)
        exact = _outcome(copy.deepcopy(rounded).double(), x.double(), seed.double())
        plain = _outcome(copy.deepcopy(rounded), x, seed)
        with launch.record() as records:
            ours = _outcome(fastconv.convert(rounded, memory_format=torch.channels_last), x, seed)
        rows += _rows(block, dtype, ours, plain, exact, bool(records))
        launches.update(record.name for record in records)
        tick()
    shape = "x".join(map(str, features.shape))
    wrong = [f"{row['dtype']} {row['tensor']}" for row in rows if not row["right"]]
    return {
        "id": f"block-{kind}",
        "kind": "block",
        "title": f"ResNet-18 block, {kind} shortcut, on a photograph's features {shape}: forward and every gradient",
        "verdict": "wrong" if wrong else "right",
        "reason": f"too far from fp64, or not by fastconv: {', '.join(wrong)}" if wrong else None,
        "rows": rows,
        "launches": dict(launches),
    }


def _outcome(block: nn.Module, x: torch.Tensor, seed: torch.Tensor) -> Tensors:
    """The output and every gradient of ``(block(x) * seed).sum()``."""
    x = x.detach().clone(memory_format=torch.channels_last).requires_grad_()
    output = block(x)
    output.backward(seed)
    gradients = {f"gradient of {name}": value.grad for name, value in block.named_parameters()}
    return {"output": output.detach(), "gradient of the input": x.grad, **gradients}


def _rows(
    block: nn.Module, dtype: torch.dtype, ours: Tensors, plain: Tensors, exact: Tensors, launched: bool
) -> list[dict[str, Any]]:
    """One row a tensor. In fp32 the largest error counts. In half precision norms count, and PyTorch's own error is the
    yardstick: some activations switch other than in fp64, and with them whole elements of a gradient."""
    exactly = dtype == torch.float32
    measure = max_error if exactly else norm_error
    bound = _tolerance(block, dtype, exact)
    rows = []
    for name, reference in exact.items():
        error, eager = measure(ours[name], reference), measure(plain[name], reference)
        allowed = bound if exactly else max(bound, YARDSTICK * eager)
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "tensor": name,
                "measure": "largest" if exactly else "norm",
                "ours": error,
                "eager": eager,
                "allowed": allowed,
                "right": error <= allowed and launched,
            }
        )
    return rows


def _tolerance(block: nn.Module, dtype: torch.dtype, exact: Tensors) -> float:
    """By the block's deepest sum, and the operations that round on the longest way: convolution, batch norm and
    activation, there and back. A weight's gradient sums over pixels, other results over channels and taps."""
    convs = [module for module in block.modules() if isinstance(module, _ConvNd)]
    pixels = exact["gradient of the input"][:, 0].numel()
    depth = max(pixels, *(conv.weight[0].numel() for conv in convs))
    return math.sqrt(2 * 3 * len(convs)) * tolerance(torch.finfo(dtype).eps, depth)
