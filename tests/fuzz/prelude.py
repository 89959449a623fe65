# ruff: noqa: F401
"""What the sources of fuzzed models can name; its text is put in front of each."""

import collections
import contextlib
import functools
import itertools
import random
import threading
import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

SEEN = []
COUNT = 0
FLAG = True
KIND = "relu"
SETTINGS = {"flag": True}
STATE = SimpleNamespace(flag=True)
ACT = F.relu
RNG = random.Random(0)
NUMPY = np.random.default_rng(0)
GENERATOR = torch.Generator().manual_seed(0)


@dataclass
class Config:
    flag: bool = True
    times: int = 2
    kind: str = "relu"
    inner: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(flag=True))


class Scaled(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 1.5


class Named(nn.Conv2d):
    pass


class Flagged(nn.Module):
    """An activation that decides."""

    def __init__(self):
        super().__init__()
        self.flag = True

    def forward(self, x):
        return F.relu(x) if self.flag else F.silu(x)


def bump():
    global COUNT
    COUNT += 1
    return COUNT


def turn():
    return bump() % 2 == 0


def noted(x):
    SEEN.append(x.detach().mean().item())
    return x


def conv_norm(conv, norm, x):
    return norm(conv(x))


@contextlib.contextmanager
def inside(name):
    SEEN.append(name)
    try:
        yield
    finally:
        SEEN.append(f"end of {name}")


def counted(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        bump()
        return forward(self, *args, **kwargs)

    return wrapper


def scaled(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        result = forward(self, *args, **kwargs)
        return result * 2 if FLAG and isinstance(result, torch.Tensor) else result

    return wrapper


def closure(flag):
    def wants(change=None):
        nonlocal flag
        if change is not None:
            flag = change
        return flag

    return wants


WANTS = closure(True)
