"""A tiny hypernetwork on the disk."""

import pytest

from hdb_core.basis import BasisRecipe
from hdb_core.files import hypernet as hypernet_file
from hdb_core.hypernet import EncoderConfig, HyperNet, HyperNetConfig
from hdb_core.layout import Layer, Layout


@pytest.fixture
def write_hypernet():
    """Writes one of a layer, drawn from a seed."""
    layout = Layout("test", (Layer("test", 16, 16),))
    encoder = EncoderConfig(image_size=16, token_width=8, patch_size=8, stem=(), depth=1, heads=2)

    def write(path, seed=0, **config):
        sizes = HyperNetConfig(layout, BasisRecipe(), encoder, width=8, depth=1, heads=2, code=2, **config)
        hypernet_file.save(HyperNet.create(sizes, seed), path, {})
        return path

    return write
