"""Wrote ``frozen/`` with version 1.0, and is not run again: its files stand for those that users have.

A later format adds files of its own: ``python -m tests.core.make_frozen FOLDER``.
"""

import sys
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch

from hdb_core.basis import BasisRecipe, layer_basis
from hdb_core.files import basis, hypernet, lidb
from hdb_core.hypernet import EncoderConfig, HyperNet, HyperNetConfig, predict, preprocess
from hdb_core.layout import Layer, Layout
from hdb_core.lidb import About, LiDB, delta_weight

LAYOUT = Layout(
    "sd1",
    (
        Layer("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 20, 20),
        Layer("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", 12, 20),
        Layer("unet.mid_block.resnets.0.conv1", 180, 20),
        Layer("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 12, 12),
    ),
)
RANDOM = BasisRecipe(seed=3, down_dim=10, up_dim=6)
ENCODER = EncoderConfig(image_size=32, token_width=16, patch_size=8, stem=((8, 1),), depth=1, heads=2)
SIZES = {"width": 16, "depth": 1, "heads": 2, "rank": 2, "code": 3}
BITS = {"of_6_bits": lidb.COMPACT, "of_16_bits": lidb.HALF, "of_32_bits": lidb.FULL}
LEARNED, PREDICTED = "in_a_learned_basis", "predicted"
PEOPLE = (*BITS, LEARNED, PREDICTED)


def photos() -> torch.Tensor:
    """Two pictures (2, 40, 40, 3) in 0..1 that no generator draws."""
    places = torch.arange(2 * 40 * 40 * 3).view(2, 40, 40, 3)
    return (places * 7919 % 256) / 255


def person(recipe: BasisRecipe) -> LiDB:
    """A person with a row for each number of their factors."""
    sizes = (4, 2, recipe.down_dim), (4, recipe.up_dim, 2)
    down, up = (((torch.arange(a * b * c) * 37 % 101).view(a, b, c) - 50) / 100 for a, b, c in sizes)
    about = About(photos=2, steps=40, name="Anna Straße 花", model="SD15", prompt="a [v] face", token="[v]")
    return LiDB(LAYOUT, recipe, down, up, about)


def changes(of: LiDB) -> dict[str, torch.Tensor]:
    """What a person changes in each layer's answer (out,) to one input, by the layer's name."""
    return {
        layer.name: delta_weight(of, i) @ torch.linspace(-1, 1, layer.in_features)
        for i, layer in enumerate(LAYOUT.layers)
    }


def read(folder: Path, name: str) -> LiDB:
    """A person of a folder."""
    if name == PREDICTED:
        net = hypernet.load(folder / "hypernet.safetensors")
        return predict(net, net.encode(preprocess(photos(), ENCODER)))
    learned = basis.load(folder / "basis.safetensors")[1] if name == LEARNED else None
    return lidb.load(folder / f"{name}.safetensors", learned)


def main(folder: Path) -> None:
    folder.mkdir()
    other = {layer.name: layer_basis(replace(RANDOM, seed=4), layer) for layer in LAYOUT.layers}
    basis.save(LAYOUT, other, (10, 6), folder / "basis.safetensors", {"people": "6"})
    learned = basis.load(folder / "basis.safetensors")[1]
    for name, bits in BITS.items():
        lidb.save(person(RANDOM), folder / f"{name}.safetensors", bits=bits)
    lidb.save(person(learned), folder / f"{LEARNED}.safetensors")
    net = HyperNet.create(HyperNetConfig(LAYOUT, RANDOM, ENCODER, **SIZES), seed=1).eval()
    for weights in (net.direct.data, net.code_map):  # which are empty before a training
        weights.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    hypernet.save(net, folder / "hypernet.safetensors", {"people": "6"})
    expected = {f"{name}/{layer}": change for name in PEOPLE for layer, change in changes(read(folder, name)).items()}
    safetensors.torch.save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
