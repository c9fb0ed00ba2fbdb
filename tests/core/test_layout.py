"""Names, order and sizes of the adapted layers, against the layers that diffusers really builds."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from hdb_core.errors import LayoutError
from hdb_core.layout import Layer, Layout, find_targets, host_keys, layout_of, neutral_unet_name, require_layers

SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280)}
SD2 = SD1 | {"cross_attention_dim": 1024, "use_linear_projection": True}
SDXL = {
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
}
MINIATURE = {
    "cross_attention_dim": 768,
    "block_out_channels": (320, 320),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
}
CASES = [
    pytest.param(
        family, config, convolutions, linears + convolutions * kernels, id=f"{name} {'all' * convolutions}".strip()
    )
    for name, family, config, linears, kernels in (
        ("sd1", "sd1", SD1, 128, 58),
        ("sd2", "sd2", SD2, 128, 58),
        ("sdxl", "sdxl", SDXL, 560, 45),
        ("miniature", "sd1", MINIATURE, 32, 20),
    )
    for convolutions in (False, True)
]


def unet_modules(config):
    with torch.device("meta"):
        return dict(UNet2DConditionModel(**config).named_modules())


def text_modules(width, layers, identities=()):
    encoder = {}
    for i in range(layers):
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear = nn.Linear(width, width)
            linear.weight.data *= not (projection == "out_proj" and i in identities)
            encoder[f"transformer.text_model.encoder.layers.{i}.self_attn.{projection}"] = linear
        encoder[f"transformer.text_model.encoder.layers.{i}.mlp.fc1"] = nn.Linear(width, width)
    return encoder


@pytest.mark.parametrize(("family", "config", "convolutions", "count"), CASES)
def test_every_layer_is_found_and_its_host_key_leads_back(family, config, convolutions, count):
    targets = find_targets(unet_modules(config), {}, family, convolutions)
    layout = layout_of(targets, family)
    assert len(layout.layers) == count and layout.has_convolutions == convolutions
    keys = host_keys(layout)
    assert len(set(keys.values())) == count
    num_res_blocks = config.get("layers_per_block", 2)
    for name, key in keys.items():
        ldm_name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        assert neutral_unet_name(ldm_name, num_res_blocks) == name


@pytest.mark.parametrize(("family", "config", "convolutions", "count"), CASES)
def test_original_and_diffusers_names_give_the_same_layout(family, config, convolutions, count):
    from_diffusers = layout_of(find_targets(unet_modules(config), {}, family, convolutions), family)
    num_res_blocks = config.get("layers_per_block", 2)
    ldm = {f"input_blocks.{num_res_blocks + 1}.0.op": nn.Conv2d(1, 1, 1)}
    for layer in reversed(from_diffusers.layers):
        key = host_keys(from_diffusers)[layer.name]
        with torch.device("meta"):
            size = layer.kernel_size
            module = (
                nn.Conv2d(layer.in_features // size**2, layer.out_features, size)
                if size
                else nn.Linear(layer.in_features, layer.out_features)
            )
        ldm[key.removeprefix("diffusion_model.").removesuffix(".weight")] = module
    assert layout_of(find_targets(ldm, {}, family, convolutions), family) == from_diffusers


def test_known_names_of_sd1():
    keys = host_keys(layout_of(find_targets(unet_modules(SD1), {"clip_l": text_modules(8, 12)}, "sd1"), "sd1"))
    block = "transformer_blocks.0"
    expected = {
        f"unet.down_blocks.0.attentions.1.{block}.attn1.to_q": f"diffusion_model.input_blocks.2.1.{block}.attn1.to_q",
        f"unet.down_blocks.2.attentions.0.{block}.attn2.to_k": f"diffusion_model.input_blocks.7.1.{block}.attn2.to_k",
        f"unet.mid_block.attentions.0.{block}.attn1.to_out.0": f"diffusion_model.middle_block.1.{block}.attn1.to_out.0",
        f"unet.up_blocks.1.attentions.0.{block}.attn2.to_v": f"diffusion_model.output_blocks.3.1.{block}.attn2.to_v",
        "text_encoder.text_model.encoder.layers.11.self_attn.out_proj": (
            "clip_l.transformer.text_model.encoder.layers.11.self_attn.out_proj"
        ),
    }
    assert {name: keys[name] for name in expected} == {name: f"{key}.weight" for name, key in expected.items()}
    projections = [name.rsplit("attn", 1)[1] for name in list(keys)[:8]]
    assert projections == [f"{i}.{p}" for i in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out.0")]


def test_order_does_not_depend_on_the_mapping():
    unet, text = unet_modules(SD1), text_modules(8, 12)
    shuffled = find_targets(dict(reversed(unet.items())), {"clip_l": dict(reversed(text.items()))}, "sd1")
    assert list(shuffled) == list(find_targets(unet, {"clip_l": text}, "sd1"))
    layers = [name.split(".")[4] for name in shuffled if name.startswith("text_encoder.")]
    assert layers == [str(i) for i in range(12) for _ in range(4)]  # 2 before 10


def test_text_layers_without_output_are_left_out():
    text = text_modules(8, 12, identities=range(2, 12))
    layout = layout_of(find_targets(unet_modules(MINIATURE), {"clip_l": text}, "sd1"), "sd1")
    assert layout.describe() == "SD 1.x, 32 UNet + 8 text layers"


def test_sdxl_has_two_text_encoders():
    text = {"clip_g": text_modules(8, 32), "clip_l": text_modules(6, 12)}
    layout = layout_of(find_targets(unet_modules(SDXL), text, "sdxl"), "sdxl")
    assert layout.describe() == "SDXL, 560 UNet + 172 text layers"  # without the last one of CLIP-L
    keys = list(host_keys(layout).values())
    assert keys[560].startswith("clip_l.") and keys[-1].startswith("clip_g.")


def test_sd2_text_encoder_is_clip_h_as_other_programs_have_it():
    layout = layout_of(find_targets(unet_modules(SD2), {"clip_h": text_modules(8, 24)}, "sd2"), "sd2")
    assert layout.describe() == "SD 2.x, 128 UNet + 92 text layers"
    assert layout == layout_of(find_targets(unet_modules(SD2), {"text_encoder": text_modules(8, 23)}, "sd2"), "sd2")
    assert list(host_keys(layout).values())[-1].startswith("clip_h.")


def test_linear_layers_are_known_by_their_sizes_and_not_by_their_class():
    class QuantisedLinear(nn.Module):
        in_features, out_features = 4, 6

    name = "middle_block.1.transformer_blocks.0.attn1.to_q"
    layout = layout_of(find_targets({name: QuantisedLinear()}, {}, "sd1"), "sd1")
    assert layout.layers == (Layer("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 4, 6),)


@pytest.mark.parametrize("family", ["flux", "sd1"])
def test_other_models_are_refused(family):
    with pytest.raises(LayoutError, match=r"SD 1\.x"):
        find_targets({"double_blocks.0.img_attn.qkv": nn.Linear(2, 2)}, {}, family)


def test_hash_knows_family_names_sizes_and_order():
    a, b = Layer("unet.a", 4, 6), Layer("unet.b", 4, 6)
    layouts = [
        Layout("sd1", (a, b)),
        Layout("sd2", (a, b)),
        Layout("sd1", (b, a)),
        Layout("sd1", (a, Layer("unet.b", 4, 7))),
    ]
    assert len({layout.hash for layout in layouts}) == len(layouts)


def test_a_model_with_more_layers_is_accepted_and_another_is_refused_in_words():
    a, b = Layer("unet.a", 4, 6), Layer("text_encoder.b", 4, 6)
    require_layers(Layout("sd1", (a,)), Layout("sd1", (a, b)))
    with pytest.raises(LayoutError, match=r"SD 1\.x, 1 UNet \+ 1 text layers.*SDXL, 1 UNet \+ 0 text"):
        require_layers(Layout("sd1", (a, b)), Layout("sdxl", (a,)))
    with pytest.raises(LayoutError, match="1 of its 1 layers"):
        require_layers(Layout("sd1", (a,)), Layout("sd1", (Layer("unet.a", 5, 6),)))


def host_layout(family, *names):
    return Layout(family, tuple(Layer(f"diffusion_model.{name}", 64, 192) for name in names))


def test_another_family_has_the_paths_of_the_host():
    layout = host_layout("ZImage", "layers.0.attention.qkv", "layers.0.conv1")
    assert layout.describe() == "ZImage, 2 layers"
    assert not layout.has_convolutions and layout.without_convolutions() == layout
    assert not any(layer.is_text for layer in layout.layers)
    name = layout.layers[0].name
    assert host_keys(layout)[name] == "diffusion_model.layers.0.attention.qkv.weight"


def test_layers_decide_and_not_the_class():
    one, other = host_layout("Flux", "a.0.b", "a.1.b"), host_layout("FluxSchnell", "a.0.b", "a.1.b")
    assert one == other and one.hash == other.hash
    require_layers(one, other)
    with pytest.raises(LayoutError, match=r"Flux, 2 layers\) than .* \(Chroma, 1 layers\): 1 of its 2"):
        require_layers(one, host_layout("Chroma", "a.0.b"))


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "down 1"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "mid"),
        ("unet.up_blocks.3.resnets.2.conv_shortcut", "up 3"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "text encoder"),
        ("text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj", "text encoder 2"),
        ("diffusion_model.double_blocks.18.img_attn.qkv", "double_blocks"),
        ("diffusion_model.layers.0.attention.qkv", "layers"),
    ],
)
def test_the_block_of_a_layer(name, block):
    assert Layer(name, 8, 8).block == block
