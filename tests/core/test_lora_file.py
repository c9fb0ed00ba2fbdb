"""A person as a LoRA file: what it holds, and what it cannot."""

import json
import time
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hdb_core.basis import BasisRecipe
from hdb_core.card import thumbnail
from hdb_core.errors import LiDBFileError
from hdb_core.files import lora
from hdb_core.layout import Layer, Layout
from hdb_core.lidb import LiDB, delta_weight

ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def scaled(lidb, factor):
    return replace(lidb, down=lidb.down * factor, up=lidb.up * factor)


@pytest.mark.parametrize("factor", [1e-2, 1.0, 100.0])
def test_holds_the_person(tmp_path, make_lidb, factor):
    lidb = scaled(make_lidb(0, 2), factor)
    lora.save(lidb, tmp_path / "p.safetensors")
    tensors = load_file(tmp_path / "p.safetensors")
    key = "lora_unet_" + lidb.layout.layers[0].name.removeprefix("unet.").replace(".", "_")
    change = tensors[f"{key}.lora_up.weight"].float() @ tensors[f"{key}.lora_down.weight"].float()
    assert float(tensors[f"{key}.alpha"]) == 2 and len(tensors) == 3 * len(lidb.layout.layers)
    torch.testing.assert_close(change, delta_weight(lidb, 0), rtol=1e-2, atol=1e-2 * factor**2)


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_says_what_other_programs_read(tmp_path, make_lidb):
    """Trigger word, base model, name, picture: where ComfyUI's own asset list, kohya's and ai-toolkit's tools look."""
    lidb, picture = make_lidb(0, 2), thumbnail(torch.zeros(3, 64, 64))
    about = replace(lidb.about, prompt="photo of a sks face", token="sks", photos=2, name="Zoë 1", thumbnail=picture)
    lora.save(replace(lidb, about=about), tmp_path / "p.safetensors", title="person")
    found = metadata_of(tmp_path / "p.safetensors")
    words = {word for folder in json.loads(found["ss_tag_frequency"]).values() for word in folder}
    assert words == {"sks"} and found["modelspec.trigger_phrase"] == "sks"
    assert (found["ss_base_model_version"], found["modelspec.architecture"]) == ("sd_v1", "stable-diffusion-v1/lora")
    assert (found["ss_output_name"], found["modelspec.title"]) == ("Zoë 1", "Zoë 1")
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("2", "2.0")
    assert found["modelspec.thumbnail"] == f"data:image/jpeg;base64,{picture}"
    assert (found["modelspec.sai_model_spec"], found["lidb_token"], found["lidb_name"]) == ("1.0.0", "sks", "Zoë 1")


@pytest.mark.parametrize("text", ["aGk=", "no base64", "data:text/html,<script>"])
def test_a_strangers_thumbnail_that_is_none_is_left_out(make_lidb, text):
    lidb = make_lidb(0)
    assert "modelspec.thumbnail" not in lora.metadata(replace(lidb, about=replace(lidb.about, thumbnail=text)))


def test_the_same_person_is_the_same_file(tmp_path, make_lidb):
    for number in range(4):
        lora.save(make_lidb(0), tmp_path / f"{number}.safetensors")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_person_without_a_name_and_a_picture_has_the_files_title(tmp_path, make_lidb):
    lidb = make_lidb(0)
    lora.save(replace(lidb, about=replace(lidb.about, name="")), tmp_path / "p.safetensors", title="person")
    found = metadata_of(tmp_path / "p.safetensors")
    assert (found["modelspec.title"], found["ss_output_name"]) == ("person", "person")
    assert not {"modelspec.thumbnail", "lidb_name"} & found.keys() and all(found.values())


@pytest.mark.parametrize(
    ("family", "base"), [("sd2", "sd_v2"), ("sdxl", "sdxl_base_v1-0"), ("Flux", "flux"), ("ZImage", "zimage")]
)
def test_the_base_model_of_each_family(make_lidb, family, base):
    lidb = make_lidb(0)
    found = lora.metadata(replace(lidb, layout=replace(lidb.layout, family=family)))
    assert found["ss_base_model_version"] == base
    assert found.get("modelspec.architecture") == {"sdxl": "stable-diffusion-xl-v1-base/lora"}.get(family)


@pytest.mark.parametrize("factor", [1e-10, 1e-7, 1e6, 1e18, float("nan")])
def test_what_float16_cannot_hold_is_refused(tmp_path, make_lidb, factor):
    with pytest.raises(LiDBFileError, match=r"too strong or too weak|NaN"):
        lora.save(scaled(make_lidb(0, 2), factor), tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "names", "message"),
    [
        ("flux", [ATTENTION], f"got the layer '{ATTENTION}' of 'flux'"),
        ("sd1", ["vae.encoder"], "got the layer 'vae.encoder'"),
        ("sd1", ["unet"], "got the layer 'unet'"),
        ("sd1", ["text_encoder_2.a"], "got the layer 'text_encoder_2.a'"),
        ("sd1", ["unet.a.b", "unet.a_b"], "Two layers of this LiDB have the same name"),
    ],
)
def test_layers_without_a_name_of_their_own_are_refused(tmp_path, recipe, family, names, message):
    layout = Layout(family, tuple(Layer(name, 16, 16) for name in names))
    factors = torch.ones(len(names), 1, recipe.down_dim), torch.ones(len(names), recipe.up_dim, 1)
    with pytest.raises(LiDBFileError, match=message):
        lora.save(LiDB(layout, recipe, *factors), tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())


# Of layers that only a file could claim: the bases of the first take hours to draw, the second makes 32 GB, and the third,
# a file of 20 KB, would take 20 s.
ABSURD = {"long": (1000, (1000, 1000), 1), "large": (4000, (30, 30), 30), "slim": (300, (8, 8), 1)}


@pytest.mark.parametrize("absurd", ABSURD)
def test_a_person_of_absurd_layers_is_refused_at_once(tmp_path, absurd):
    count, (a, b), rank = ABSURD[absurd]
    names = (f"unet.down_blocks.{i}.attentions.0.transformer_blocks.0.attn1.to_q" for i in range(count))
    layout = Layout("sd1", tuple(Layer(name, 65_536, 65_536) for name in names))
    lidb = LiDB(layout, BasisRecipe(0, a, b), torch.ones(count, rank, a), torch.ones(count, b, rank))
    start = time.process_time()
    with pytest.raises(LiDBFileError, match="too large for a LoRA file"):
        lora.save(lidb, tmp_path / "p.safetensors")
    assert time.process_time() - start < 5 and not list(tmp_path.iterdir())
