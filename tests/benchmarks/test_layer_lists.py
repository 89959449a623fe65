"""Layer lists: those committed are what their networks call, and what is no list is refused with line and field."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastconv.benchmarks import layer_lists
from fastconv.benchmarks.calls import read_off
from fastconv.benchmarks.layer_lists import FOLDER, SCHEMA
from fastconv.benchmarks.networks import NETWORKS
from fastconv.benchmarks.write_layers import layers_of

HEADER = {"schema": SCHEMA, "network": "mine", "image": [3, 8, 8]}
CONV = {"count": 2, "function": "conv2d", "input": [4, 8, 8], "weight": [6, 4, 3, 3]}
POOL = {"count": 1, "function": "max_pool2d", "input": [4, 8, 8], "kernel_size": 2}


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "mine.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n"
    path.write_text(text, errors="surrogateescape")
    return path


@pytest.mark.parametrize("name", NETWORKS)
def test_committed_lists_are_what_the_networks_call(name: str) -> None:
    text = (FOLDER / f"{name}.jsonl").read_text()
    assert layers_of(name) == text
    assert layer_lists.dump(layer_lists.find(name)) == text


def test_every_network_has_its_list_and_no_other_lies_there() -> None:
    assert set(layer_lists.shipped()) == NETWORKS.keys()


def test_counts_and_arithmetic_are_the_papers() -> None:
    calls = layer_lists.find("resnet50").calls
    convolutions = {call: count for call, count in calls.items() if not call.pool}
    assert sum(convolutions.values()) == 53
    (first,) = (call for call in convolutions if call.input[1] == 3)
    assert first.first and [call for call in calls if not call.needs_dx] == [first]
    # 4.09 billion an image.
    assert sum(count * call.multiplications for call, count in calls.items()) == pytest.approx(4.09e9, rel=0.01)
    unet = layer_lists.find("unet").calls
    assert sum(count for call, count in unet.items() if call.transposed) == 4
    assert {call.output[1] for call in unet if call.transposed} == {512, 256, 128, 64}


def test_calls_are_alike_however_they_are_written() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for same in ({"stride": 2}, {"stride": [2], "ceil_mode": False}, {"stride": (2, 2)}):
                nn.functional.max_pool2d(x, 2, **same)
            nn.functional.lp_pool2d(x, 2.0, 2)
            return nn.functional.max_pool2d(x, 2, return_indices=True)[0]

    found = read_off(Net(), (1, 3, 8, 8))
    assert {call.function: count for call, count in found.items()} == {"max_pool2d": 3, "lp_pool2d": 1}
    assert next(iter(found)).directions == ("forward", "forward, training")  # of an image


def test_a_users_list_is_read(tmp_path) -> None:
    strided = CONV | {"stride": [2, 2], "padding": "valid", "bias": True, "needs_dx": False}
    path = written(tmp_path, HEADER, CONV, strided, CONV, POOL | {"padding": [1, 0]})
    found = layer_lists.find(str(path))
    assert (found.network, found.image) == ("mine", (3, 8, 8))
    plain, asked, pool = found.calls
    assert list(found.calls.values()) == [4, 2, 1]
    assert (plain.shapes, plain.needs_dx) == (((1, 4, 8, 8), (6, 4, 3, 3), None), True)
    assert dict(asked.arguments) == {"stride": 2, "padding": "valid", "dilation": 1, "groups": 1}
    assert asked.shapes[2] == (6,) and asked.output == (1, 6, 3, 3) and not asked.needs_dx
    assert dict(pool.arguments)["padding"] == (1, 0)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], "line 1: no JSON"),
        (["[1]"], "line 1: an object is expected"),
        (["[" * 100_000], "line 1: nested too deeply"),
        (["9" * 5000], "line 1: no JSON"),
        (["\x00\udcff"], "line 1: no JSON"),
        ([HEADER | {"schema": "fastconv-layers/9"}], f"line 1, field schema: 'fastconv-layers/9', .* {SCHEMA!r}"),
        ([HEADER | {"batch": 4}], "line 1, field batch: unknown; there are schema, network, image"),
        ([HEADER | {"network": ""}], "line 1, field network: a name"),
        (
            [HEADER | {"image": [3, 0]}],
            r"line 1, field image: a list of positive integers .* is expected, not \[3, 0\]",
        ),
        ([HEADER], "line 2: no call"),
        ([HEADER, "{"], "line 2: no JSON"),
        ([HEADER, CONV, CONV | {"strde": 2}], "line 3, field strde: unknown; there are .*stride"),
        ([HEADER, POOL | {"weight": [1, 1, 2, 2]}], "line 2, field weight: unknown"),
        ([HEADER, POOL | {"return_indices": True}], "line 2, field return_indices: unknown"),
        ([HEADER, CONV | {"function": "conv4d"}], "line 2, field function: 'conv4d' is not one of .*conv2d"),
        (
            [HEADER, CONV | {"count": 0}],
            "line 2, field count: a positive integer of at most 2147483647 is expected, not 0",
        ),
        ([HEADER, CONV | {"count": 10**30}], "line 2, field count"),
        ([HEADER, CONV | {"count": True}], "line 2, field count"),
        ([HEADER, CONV | {"bias": 6}], "line 2, field bias: true or false is expected, not 6"),
        ([HEADER, CONV | {"input": [4, 8]}], "line 2, field input: a list of 3 positive integers"),
        ([HEADER, {k: v for k, v in CONV.items() if k != "weight"}], "line 2, field weight: a list of 4"),
        ([HEADER, {k: v for k, v in POOL.items() if k != "kernel_size"}], "line 2, field kernel_size: missing"),
        ([HEADER, CONV | {"stride": [1, 2, 3]}], "line 2, field stride: an integer, or one for each of 2 axes"),
        ([HEADER, CONV | {"stride": 1.5}], "line 2, field stride"),
        ([HEADER, CONV | {"stride": 10**23}], "line 2, field stride: at most 2147483647 is expected, not 1000"),
        ([HEADER, CONV | {"padding": [1, -(10**23)]}], "line 2, field padding: at most"),
        ([HEADER, CONV | {"padding": 2**31 - 1}], "line 2, fields input, weight, padding: .* elements for one image"),
        ([HEADER, CONV | {"input": [4, 2**31, 8]}], "line 2, field input: a list of 3 positive integers of at most"),
        ([HEADER, POOL | {"input": [2**31 - 1] * 3}], "line 2, field"),
        (
            [HEADER, CONV | {"padding": "same", "stride": 2}],
            "line 2, fields padding, stride: padding='same' is not supported for strided convolutions",
        ),
        ([HEADER, CONV | {"stride": 0}], "line 2, field stride: non-positive stride"),
        ([HEADER, CONV | {"padding": "some"}], "line 2, field padding"),
        ([HEADER, CONV | {"groups": [2, 2]}], "line 2, field groups"),
        ([HEADER, CONV | {"weight": [6, 3, 3, 3]}], "line 2, fields input, weight: .*to have 3 channels, but got 4"),
        ([HEADER, CONV | {"groups": 3}], "line 2, fields .*groups"),
        ([HEADER, CONV | {"weight": [6, 4, 9, 9]}], "line 2, field.* input.*: Calculated padded input size"),
        (
            [HEADER, CONV | {"function": "conv_transpose2d", "weight": [4, 6, 3, 3], "output_padding": 3}],
            "line 2, fields .*output_padding: output padding must be smaller than either stride or dilation",
        ),
        ([HEADER, POOL | {"kernel_size": 9}], "line 2, field.* input.*: .*Output size is too small"),
        ([HEADER, POOL | {"padding": 2}], "line 2, field.*kernel_size.*: pad should be at most half"),
        ([HEADER, POOL | {"function": "avg_pool2d", "divisor_override": 0}], "line 2, field divisor_override: another"),
        ([HEADER, POOL | {"ceil_mode": 1}], "line 2, field ceil_mode: true or false is expected, not 1"),
        ([HEADER, POOL | {"function": "lp_pool2d", "norm_type": "2"}], "line 2, field norm_type: a positive number"),
        ([HEADER, POOL | {"function": "lp_pool2d", "norm_type": -3}], "line 2, field norm_type: a positive number"),
        ([HEADER, json.dumps(POOL | {"function": "lp_pool2d", "norm_type": float("nan")})], "line 2: NaN is no number"),
        (
            [HEADER, json.dumps(POOL | {"function": "lp_pool2d", "norm_type": 0}).replace("0}", "1e999}")],
            "line 2, field norm_type: a positive number is expected, not inf",
        ),
    ],
)
def test_what_is_no_list_is_refused_by_line_and_field(lines: list[Any], expected: str, tmp_path) -> None:
    path = written(tmp_path, *lines)
    with pytest.raises(ValueError, match=f"^{path}, {expected}") as refusal:
        layer_lists.find(str(path))
    assert "\n" not in str(refusal.value)


def test_a_file_without_end_is_not_read() -> None:
    with pytest.raises(ValueError, match="cannot read the layer list /dev/zero: over 1 MiB"):
        layer_lists.find("/dev/zero")


def test_a_file_that_is_not_there_names_the_lists_that_are() -> None:
    with pytest.raises(ValueError, match=r"cannot read the layer list resnt50: No such file.*resnet50"):
        layer_lists.find("resnt50")


@pytest.mark.parametrize("name", NETWORKS)
def test_tiny_operators_are_possible_and_of_their_kind(name: str) -> None:
    for call in layer_lists.find(name).calls:
        tiny = call.with_batch(64).tiny()
        assert tiny.batch == 2 and 0 not in tiny.output and tiny.elements < 2**20
        assert (tiny.first, tiny.groups > 1, tiny.groups == tiny.input[1]) == (
            *(call.first, call.groups > 1, call.groups == call.input[1]),
        )
