"""Write the layer lists in `benchmarks/layers/` from the networks: ``python -m fastconv.benchmarks.write_layers``."""

from __future__ import annotations

import torch

from fastconv.benchmarks.calls import read_off
from fastconv.benchmarks.layer_lists import FOLDER, LayerList, dump
from fastconv.benchmarks.networks import NETWORKS


def layers_of(name: str) -> str:
    """The list of the network ``name``, as its file holds it."""
    network = NETWORKS[name]
    with torch.device("meta"):
        model = network.make()
    return dump(LayerList(name, network.image, read_off(model, (1, *network.image))))


if __name__ == "__main__":
    for name in NETWORKS:
        (FOLDER / f"{name}.jsonl").write_text(layers_of(name))
