"""Training reads checkpoint files of full size: their keys and shapes, as ComfyUI has them, without weights."""

from __future__ import annotations

import pytest
import torch

SD2_UNET = {"context_dim": 1024, "num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True}
SDXL_UNET = {
    **SD2_UNET, "context_dim": 2048, "channel_mult": (1, 2, 4), "num_res_blocks": [2, 2, 2], "num_classes": "sequential",
    "adm_in_channels": 2816, "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
}  # fmt: skip
UNETS = {"sd1": {}, "sd2": SD2_UNET, "sdxl": SDXL_UNET}


def open_clip(width, layers):
    """OpenCLIP's names and shapes."""
    layer = {
        "ln_1.weight": (width,), "ln_1.bias": (width,), "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,), "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
        "ln_2.weight": (width,), "ln_2.bias": (width,), "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,),
    }  # fmt: skip
    shapes = {
        "positional_embedding": (77, width), "token_embedding.weight": (49408, width), "ln_final.weight": (width,),
        "ln_final.bias": (width,), "text_projection": (width, width),
        **{f"transformer.resblocks.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()},
    }  # fmt: skip
    return {name: torch.empty(shape) for name, shape in shapes.items()}


def checkpoint(host, family):
    """Tensors on the meta device, by the names of an original checkpoint."""
    import comfy.clip_model
    import comfy.ops
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    builder, ops = host.load_file("random_checkpoint.py"), comfy.ops.disable_weight_init
    with torch.device("meta"):
        unet = UNetModel(**{**builder.FULL_UNET, **UNETS[family]}, operations=ops)
        vae = AutoencoderKL(ddconfig=builder.KL_VAE, embed_dim=4)
        clip_l = comfy.clip_model.CLIPTextModel(builder.CLIP_L, torch.float16, "meta", ops).state_dict()
        texts = {
            "sd1": {"cond_stage_model.transformer.": clip_l},
            "sd2": {"cond_stage_model.model.": open_clip(1024, 24)},
            "sdxl": {"conditioner.embedders.0.transformer.": clip_l, "conditioner.embedders.1.model.": open_clip(1280, 32)},
        }  # fmt: skip
    parts = {"model.diffusion_model.": unet.state_dict(), **texts[family], "first_stage_model.": vae.state_dict()}
    return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


@pytest.mark.parametrize(("family", "text_layers"), [("sd1", 12), ("sd2", 23), ("sdxl", 12)])
def test_full_size_checkpoints(host, family, text_layers):
    single_file, layout = host.module("hdb_core.train.base.single_file"), host.module("hdb_core.layout")
    with torch.inference_mode(False):
        tensors = checkpoint(host, family)
        unet, text, vae = (getattr(single_file, f"{part}_of")(tensors) for part in ("unet", "text_encoder", "vae"))
    targets = layout.find_targets(dict(unet.named_modules()), {}, family)
    assert len(targets) == (560 if family == "sdxl" else 128)
    heads = {module.heads for name, module in unet.named_modules() if name.endswith("attn1")}
    assert heads == {"sd1": {8}, "sd2": {5, 10, 20}, "sdxl": {10, 20}}[family]
    if family == "sdxl":
        second = single_file.second_text_encoder_of(tensors)
        assert (second.config.num_hidden_layers, second.config.num_attention_heads) == (32, 20)
        assert second.config.hidden_act == "gelu" and second.text_projection.out_features == 1280
        assert unet.config.cross_attention_dim == text.config.hidden_size + second.config.hidden_size
        assert unet.config.projection_class_embeddings_input_dim == second.config.projection_dim + 6 * 256
    else:
        assert unet.config.cross_attention_dim == text.config.hidden_size
    assert (text.config.num_hidden_layers, text.config.num_attention_heads) == (
        text_layers,
        text.config.hidden_size // 64,
    )
    assert text.config.hidden_act == ("gelu" if family == "sd2" else "quick_gelu")
    assert vae.config.block_out_channels == [128, 256, 512, 512]
    assert vae.config.layers_per_block == 2


def test_inpainting_is_refused(host):
    single_file = host.module("hdb_core.train.base.single_file")
    tensors = checkpoint(host, "sd1")
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.empty(320, 9, 3, 3, device="meta")
    with pytest.raises(host.module("hdb_core.errors").LayoutError, match=r"takes 9 channels.*--model"):
        single_file.unet_of(tensors)


def test_other_schedules_are_refused(host, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "edm.safetensors"
    save_file({"edm_mean": torch.zeros(4)}, path)
    with pytest.raises(host.module("hdb_core.errors").LayoutError, match=r"edm_mean says that it is EDM's.*--model"):
        host.module("hdb_core.train.base.single_file").read_single_file(path, torch.float32)


def test_sd2_does_not_say_what_it_predicts(host, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "sd2.safetensors"
    save_file({"cond_stage_model.model.ln_final.bias": torch.zeros(1024)}, path)
    with pytest.raises(host.module("hdb_core.errors").LayoutError, match="--prediction-type"):
        host.module("hdb_core.train.base.single_file").read_single_file(path, torch.float32)


@pytest.mark.parametrize(
    ("part", "name", "shape"),
    [
        ("unet", "model.diffusion_model.input_blocks.0.0.weight", (320,)),
        ("unet", "model.diffusion_model.input_blocks.4.0.in_layers.2.weight", (0, 320, 3, 3)),
        ("text_encoder", "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight", (49408,)),
        ("vae", "first_stage_model.encoder.down.", None),
    ],
    ids=["too few dimensions", "no channels", "a vector of words", "a decoder alone"],
)
def test_tensors_of_another_form_are_said(host, part, name, shape):
    tensors = {own: tensor for own, tensor in checkpoint(host, "sd1").items() if shape or not own.startswith(name)}
    if shape:
        tensors[name] = torch.empty(shape, device="meta")
    with pytest.raises(host.module("hdb_core.errors").LayoutError, match=r"is of another form \(.+\).*--model"):
        getattr(host.module("hdb_core.train.base.single_file"), f"{part}_of")(tensors)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "model.diffusion_model.input_blocks.1.1.transformer_blocks.{}.x"),
        ("text_encoder", "cond_stage_model.transformer.text_model.encoder.layers.{}.x"),
        ("vae", "first_stage_model.encoder.down.0.block.{}.x"),
    ],
)
def test_a_name_does_not_make_a_billion_layers(host, part, name):
    """50 KB would have taken months, and all memory."""
    tensors = checkpoint(host, "sd1") | {name.format(10**9): torch.empty(1, device="meta")}
    with pytest.raises(host.module("hdb_core.errors").LayoutError, match="is of another form"):
        getattr(host.module("hdb_core.train.base.single_file"), f"{part}_of")(tensors)


def test_a_name_does_not_make_a_billion_blocks(host):
    """They were looked for one by one."""
    alone = {f"model.diffusion_model.input_blocks.{10**9}.x": torch.empty(1, device="meta")}
    with pytest.raises(host.module("hdb_core.errors").LayoutError, match="is of another form"):
        host.module("hdb_core.train.base.single_file").unet_of(alone)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("text_encoder", "cond_stage_model.transformer.text_model.encoder.layers.{}.x"),
        ("vae", "first_stage_model.encoder.down.0.block.{}.x"),
        ("unet", "model.diffusion_model.input_blocks.1.1.transformer_blocks.{}.x"),
    ],
)
def test_names_do_not_make_a_thousand_layers(host, part, name):
    """Of no size, in 225 KB; it took a minute."""
    tensors = checkpoint(host, "sd1") | {name.format(i): torch.empty(0, device="meta") for i in range(1000)}
    with pytest.raises(host.module("hdb_core.errors").LayoutError, match="it has 1000 layers"):
        getattr(host.module("hdb_core.train.base.single_file"), f"{part}_of")(tensors)


def test_blocks_of_many_layers_each_are_refused(host):
    name = "model.diffusion_model.input_blocks.{}.1.transformer_blocks.{}.x"
    many = {name.format(block, i): torch.empty(0, device="meta") for block in (1, 4, 7) for i in range(40)}
    with pytest.raises(host.module("hdb_core.errors").LayoutError, match="it has 240 transformer blocks"):
        host.module("hdb_core.train.base.single_file").unet_of(checkpoint(host, "sd1") | many)


@pytest.mark.parametrize(
    ("dtype", "beside"),
    [
        (torch.float8_e4m3fn, "scale_weight"), (torch.float8_e4m3fn, "weight_scale"),
        (torch.float8_e5m2, "comfy_quant"), (torch.int8, "SCB"), (torch.uint8, "weight.absmax"),
    ],
)  # fmt: skip
def test_quantised_weights_are_refused(host, tmp_path, dtype, beside):
    """They were taken for the weights themselves, and a model of noise was trained with."""
    from safetensors.torch import save_file

    path, layer = tmp_path / "quantised.safetensors", "model.diffusion_model.input_blocks.1.1.proj_in"
    weight = {f"{layer}.weight": torch.ones(4, 4).to(dtype), f"{layer}.bias": torch.ones(4)}
    read, errors = host.module("hdb_core.train.base.single_file").read_single_file, host.module("hdb_core.errors")
    save_file(weight | {f"{layer}.{beside}": torch.ones(1)}, path)
    with pytest.raises(
        errors.LayoutError, match=r"quantised\.safetensors holds quantised weights \(.*proj_in\.weight\)"
    ):
        read(path, torch.float32)
    if dtype.is_floating_point:  # alone, they are the weights themselves
        save_file(weight, path)
        with pytest.raises(errors.LayoutError, match="is of another form"):
            read(path, torch.float32)
