"""A tiny random diffusers model, on which trainings run in seconds."""

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from miniature.text import load_tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=768, norm_num_groups=8,
            attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        text = CLIPTextModel(CLIPTextConfig(num_hidden_layers=1, hidden_size=768, intermediate_size=32, num_attention_heads=4))  # fmt: skip
        vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
        vae.decoder.layers[-1].weight.data *= 100  # or all pictures are black
    for name, part in (
        ("unet", unet),
        ("text_encoder", text),
        ("vae", vae),
        ("tokenizer", load_tokenizer()),
    ):
        part.save_pretrained(folder / name)
    DDPMScheduler(beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_device_is_kept():
    """A process otherwise keeps the device and the precision of its first training for the trainings of later files."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
