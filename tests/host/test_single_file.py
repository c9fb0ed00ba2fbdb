"""Training reads checkpoint files of full size: their keys and shapes, as ComfyUI has them, without weights."""

from __future__ import annotations

import pytest
import torch

SD2_UNET = {"context_dim": 1024, "num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True}
OPEN_CLIP_LAYER = {
    "ln_1.weight": (1024,), "ln_1.bias": (1024,), "attn.in_proj_weight": (3072, 1024), "attn.in_proj_bias": (3072,),
    "attn.out_proj.weight": (1024, 1024), "attn.out_proj.bias": (1024,), "ln_2.weight": (1024,), "ln_2.bias": (1024,),
    "mlp.c_fc.weight": (4096, 1024), "mlp.c_fc.bias": (4096,), "mlp.c_proj.weight": (1024, 4096), "mlp.c_proj.bias": (1024,),
}  # fmt: skip
OPEN_CLIP = {
    "positional_embedding": (77, 1024), "token_embedding.weight": (49408, 1024), "ln_final.weight": (1024,),
    "ln_final.bias": (1024,), "text_projection": (1024, 1024),
    **{f"transformer.resblocks.{i}.{name}": shape for i in range(24) for name, shape in OPEN_CLIP_LAYER.items()},
}  # fmt: skip


def checkpoint(host, family):
    """Tensors on the meta device, by the names of an original checkpoint."""
    import comfy.clip_model
    import comfy.ops
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    builder, ops = host.load_file("random_checkpoint.py"), comfy.ops.disable_weight_init
    with torch.device("meta"):
        unet = UNetModel(**{**builder.FULL_UNET, **(SD2_UNET if family == "sd2" else {})}, operations=ops)
        vae = AutoencoderKL(ddconfig=builder.KL_VAE, embed_dim=4)
        clip_l = comfy.clip_model.CLIPTextModel(builder.CLIP_L, torch.float16, "meta", ops).state_dict()
        open_clip = {name: torch.empty(shape) for name, shape in OPEN_CLIP.items()}
    text = ("cond_stage_model.model.", open_clip) if family == "sd2" else ("cond_stage_model.transformer.", clip_l)
    parts = [("model.diffusion_model.", unet.state_dict()), text, ("first_stage_model.", vae.state_dict())]
    return {prefix + name: tensor for prefix, part in parts for name, tensor in part.items()}


@pytest.mark.parametrize(("family", "text_layers"), [("sd1", 12), ("sd2", 23)])
def test_full_size_checkpoints(host, family, text_layers):
    single_file, layout = host.module("hdb_core.train.base.single_file"), host.module("hdb_core.layout")
    with torch.inference_mode(False):
        tensors = checkpoint(host, family)
        unet, text, vae = (getattr(single_file, f"{part}_of")(tensors) for part in ("unet", "text_encoder", "vae"))
    targets = layout.find_targets(dict(unet.named_modules()), {}, family)
    assert len(targets) == 128
    heads = {module.heads for name, module in unet.named_modules() if name.endswith("attn1")}
    assert heads == ({8} if family == "sd1" else {5, 10, 20})
    assert unet.config.cross_attention_dim == text.config.hidden_size
    assert (text.config.num_hidden_layers, text.config.num_attention_heads) == (
        text_layers,
        text.config.hidden_size // 64,
    )
    assert text.config.hidden_act == ("quick_gelu" if family == "sd1" else "gelu")
    assert vae.config.block_out_channels == [128, 256, 512, 512]
    assert vae.config.layers_per_block == 2


def test_inpainting_is_refused(host):
    single_file = host.module("hdb_core.train.base.single_file")
    tensors = checkpoint(host, "sd1")
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.empty(320, 9, 3, 3, device="meta")
    with pytest.raises(host.module("hdb_core.errors").LayoutError, match=r"takes 9 channels.*--model"):
        single_file.unet_of(tensors)


def test_sd2_does_not_say_what_it_predicts(host, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "sd2.safetensors"
    save_file({"cond_stage_model.model.ln_final.bias": torch.zeros(1024)}, path)
    with pytest.raises(host.module("hdb_core.errors").LayoutError, match="--prediction-type"):
        host.module("hdb_core.train.base.single_file").read_single_file(path, torch.float32)
