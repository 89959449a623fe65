"""LeNet-5 trained on handwritten digits, twice from one seed: plain PyTorch, and converted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

import fastconv
from fastconv.benchmarks.networks import lenet5
from fastconv.benchmarks.report.results import Part
from fastconv.kernels.launch import launch

SEED = 0
BATCH = 64
STEPS = 60
TOLERANCE = 1e-4  # of every step's loss, between the two
LEAST_ACCURACY = 0.6  # after STEPS steps, on images neither has seen


def LeNet5() -> nn.Module:
    """For images of 12x12, which leave one pixel for the last layers."""
    return lenet5(padding=2, features=16)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's 1,797 scanned digits, shuffled: images ``[1797, 1, 12, 12]``, padded from 8x8, and labels.
    Brightness has mean 0 and deviation 1, as in LeCun's paper."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = F.pad(torch.from_numpy(data.images).float()[:, None], (2, 2, 2, 2))
    images = (images - images.mean()) / images.std()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    return images[order], torch.from_numpy(data.target)[order]


def run(steps: int = STEPS, tick: Callable[[], None] = lambda: None) -> Part:
    """Train both side by side and compare every step's loss; ``tick`` is called after each step."""
    images, labels = digits()
    held_out = len(images) // 5
    training = images[held_out:], labels[held_out:]
    torch.manual_seed(SEED)
    plain = LeNet5()
    converted = fastconv.convert(LeNet5())
    converted.load_state_dict(plain.state_dict())
    launches: Counter[str] = Counter()
    losses: dict[str, list[float]] = {"plain": [], "fastconv": []}
    trainers = _train(plain, *training), _train(converted, *training)
    for _ in range(steps):
        losses["plain"].append(next(trainers[0]))
        with launch.record() as records:
            losses["fastconv"].append(next(trainers[1]))
        launches.update(record.name for record in records)
        tick()
    with torch.no_grad():
        accuracy = {
            name: (model(images[:held_out]).argmax(1) == labels[:held_out]).float().mean().item()
            for name, model in (("plain", plain), ("fastconv", converted))
        }
    worst = max(abs(a - b) for a, b in zip(losses["plain"], losses["fastconv"], strict=True))
    part: Part = {
        "id": "lenet",
        "kind": "training",
        "title": f"LeNet-5 on {len(images)} handwritten digits, batch {BATCH}, {steps} steps, fp32",
        "losses": losses,
        "accuracy": accuracy,
        "held_out": held_out,
        "loss_difference": worst,
        "tolerance": TOLERANCE,
        "launches": dict(launches),
    }
    reasons = []
    if not launches:
        reasons.append("no kernel of fastconv ran")
    if not worst <= TOLERANCE:
        reasons.append(f"losses differ by {worst:.1e}, more than {TOLERANCE:.0e}")
    # A quick look has fewer steps than STEPS; no accuracy is asked of it.
    if steps >= STEPS and min(accuracy.values()) <= LEAST_ACCURACY:
        reasons.append(f"accuracy is not over {LEAST_ACCURACY:.0%}")
    return part | {"verdict": "wrong" if reasons else "right", "reason": "; ".join(reasons) or None}


def _train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Iterator[float]:
    """Each ``next`` is one step of SGD on the next batch; yields the loss before the update."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    order = torch.Generator().manual_seed(SEED)
    while True:
        for batch in torch.randperm(len(images), generator=order)[: len(images) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            yield loss.item()
