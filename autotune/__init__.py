"""Which tile for which problem on which GPU; knows nothing of kernels. Import as ``fastconv.autotune``."""

if __name__ != "fastconv.autotune":
    raise ImportError(f"import 'fastconv.autotune', not {__name__!r}: the folder is part of the fastconv package")

from fastconv.autotune.choose import Adapter, Choice, Policy, choose
from fastconv.autotune.cost_model import Work, predict
from fastconv.autotune.gpus import Gpu, gpu_named, known_gpus
from fastconv.autotune.records import Measured, ProblemKey, Tuned, Untuned, Version
from fastconv.autotune.schema import SchemaError
from fastconv.autotune.space import Config, Space
from fastconv.autotune.store import Store

__all__ = [
    "Adapter",
    "Choice",
    "Config",
    "Gpu",
    "Measured",
    "Policy",
    "ProblemKey",
    "SchemaError",
    "Space",
    "Store",
    "Tuned",
    "Untuned",
    "Version",
    "Work",
    "choose",
    "gpu_named",
    "known_gpus",
    "predict",
]
