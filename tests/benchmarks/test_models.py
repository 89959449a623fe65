"""Models by name: torchvision's (with or without its compiled part), timm's, and the user's own."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from fastconv.benchmarks import models


def test_a_users_factory_and_its_own_channels() -> None:
    loaded = models.load("tests.cli.tiny:network", 4, 9)
    assert loaded.input_shape == (4, 3, 9, 9)
    assert loaded.memory_format == torch.channels_last
    assert loaded.model.training


def test_the_same_seed_gives_the_same_weights() -> None:
    first, again, other = (models.load("tests.cli.tiny:network", 1, seed=seed).model[0].weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_model_of_rank_3_gets_frames() -> None:
    loaded = models.load("tests.cli.tiny:volume", 1, 9)
    assert loaded.input_shape == (1, 2, 16, 9, 9)
    assert loaded.memory_format == torch.channels_last_3d


def test_a_factory_that_makes_no_module_is_bad_usage() -> None:
    with pytest.raises(ValueError, match="returned Tensor"):
        models.load("tests.cli.tiny:not_a_module", 1)


@pytest.mark.parametrize(
    ("code", "expected"), [("def f(:", "SyntaxError"), ("import os; os.nothing", "no attribute 'nothing'")]
)
def test_a_module_that_does_not_import_is_bad_usage(code: str, expected: str, tmp_path, monkeypatch) -> None:
    (tmp_path / "a_users_broken_module.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(ValueError, match=expected):
        models.load("a_users_broken_module:network", 1)


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is an optional extra")
@pytest.mark.parametrize(("name", "size"), [("resnet18", 224), ("resnet10t", 176)])
def test_torchvisions_and_timms_names(name: str, size: int) -> None:
    loaded = models.load(name, 2)
    assert loaded.input_shape == (2, 3, size, size)


def test_an_unknown_name_gets_the_close_ones_once() -> None:
    with pytest.raises(ValueError, match=r"close names: resnet18, [a-z]") as error:
        models.load("resnt18", 1)
    assert str(error.value).count(" resnet18,") == 1


def test_torchvision_imports_beside_a_torch_that_its_compiled_part_does_not_fit() -> None:
    script = (
        "import torch; from fastconv.benchmarks.models import torchvision; vision = torchvision();"
        "assert torchvision() is vision; import torchvision.models.detection, timm"
    )
    subprocess.run([sys.executable, "-c", script], timeout=120, check=True)
