"""The miniature, packed, expanded and read by the stock loader, computes what its training modules compute."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from miniature.base import Base
from miniature.checkpoint import expand, write_base, write_vae
from miniature.control import Controlled, build_control, control_tensors
from miniature.packing import pack_tensors, unpack_tensors
from miniature.text import load_tokenizer, tokenize, vocabulary
from miniature.vae import build_vae

PROMPT = "a [v] face, smiling"
STD = 1.25


def stored(module: torch.nn.Module, packed: bool) -> dict[str, torch.Tensor]:
    """The weights as they come back from their file, and put into the module itself."""
    state = {name: weight.float() for name, weight in module.state_dict().items()}
    state = unpack_tensors(pack_tensors(state)) if packed else state
    module.load_state_dict({name: weight.half().float() for name, weight in state.items()})
    return state


@pytest.fixture(scope="module")
def miniature(host, base_directory, tmp_path_factory):
    """Random training modules, and MODEL, CLIP, VAE of the checkpoint made from them."""
    tokenizer = load_tokenizer()
    rows = vocabulary(tokenizer)
    with torch.inference_mode(False), torch.no_grad():
        base, vae = Base(rows), build_vae()
        weights = tmp_path_factory.mktemp("weights")
        write_base(weights, stored(base, True), rows)
        write_vae(weights, stored(vae, False), STD)
    expand(weights, base_directory / "models" / "checkpoints" / "expanded.safetensors")
    with torch.inference_mode():
        model, clip, host_vae = host.stock["CheckpointLoaderSimple"]().load_checkpoint("expanded.safetensors")
    return SimpleNamespace(
        base=base.eval(), vae=vae.eval(), tokenizer=tokenizer, model=model, clip=clip, host_vae=host_vae
    )


def test_is_detected_as_sd15(miniature):
    assert type(miniature.model.model.model_config).__name__ == "SD15"


def test_text_encoder(miniature):
    tokens = torch.searchsorted(miniature.base.rows, tokenize(miniature.tokenizer, [PROMPT]))
    expected = miniature.base.text_encoder(tokens).last_hidden_state
    got = miniature.clip.encode_from_tokens(miniature.clip.tokenize(PROMPT))
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=0)
    assert expected.std() > 0.5


def test_unet(miniature):
    generator = torch.Generator().manual_seed(0)
    noisy, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 77, 768, generator=generator)
    timesteps = torch.tensor([17, 801])
    expected = miniature.base.unet(noisy, timesteps, text).sample
    got = miniature.model.model.diffusion_model(noisy, timesteps, context=text)
    torch.testing.assert_close(got, expected, atol=2e-3 * float(expected.std()), rtol=0)


def test_vae_gives_the_model_unit_variance_latents(miniature):
    picture = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    raw = miniature.vae.encoder(picture.movedim(-1, 1) * 2 - 1)
    latents = miniature.host_vae.encode(picture)
    torch.testing.assert_close(miniature.model.model.process_latent_in(latents), raw / STD, atol=1e-2, rtol=1e-2)
    decoded = (miniature.vae.decoder(raw).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(miniature.host_vae.decode(latents), decoded.movedim(1, -1), atol=1e-2, rtol=0)


def test_packing_is_close():
    """int8 rows: the error of a weight is at most half a step of its row."""
    weight = torch.randn(64, 320, generator=torch.Generator().manual_seed(0))
    back = unpack_tensors(pack_tensors({"weight": weight}))["weight"]
    assert ((back - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127 * 0.51).all()


@pytest.fixture
def control(miniature, tmp_path):
    """A Control-LoRA with random trained weights, and its file as the stock loader reads it."""
    import comfy.controlnet

    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode(False), torch.no_grad():
        made = build_control(miniature.base, rank=3)
        trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
        for parameter in trained.values():
            values = torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5
            parameter.copy_(values.half())
        save_file(control_tensors(trained), tmp_path / "control.safetensors")
    read = comfy.controlnet.load_controlnet(str(tmp_path / "control.safetensors"), miniature.model)
    read.pre_run(miniature.model.model, lambda percent: 0.0)
    return made.eval(), read


def test_the_stock_loader_reads_a_control_lora(miniature, control):
    made, read = control
    assert type(read).__name__ == "ControlLora"
    generator = torch.Generator().manual_seed(0)
    noisy, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 77, 768, generator=generator)
    timesteps, shape = torch.tensor([17, 801]), torch.rand(2, 3, 128, 128, generator=generator)
    with torch.no_grad():
        down, middle = made(noisy, timesteps, text, controlnet_cond=shape, return_dict=False)
        got = read.control_model(noisy.float(), hint=shape, timesteps=timesteps.float(), context=text)
    assert len(got["output"]) == len(down)
    for ours, theirs in zip([*down, middle], [*got["output"], *got["middle"]], strict=True):
        torch.testing.assert_close(theirs.float(), ours, atol=1e-2 * float(ours.std()), rtol=0)


def test_an_untrained_control_lora_changes_nothing(miniature):
    with torch.inference_mode(False), torch.no_grad():
        control = build_control(miniature.base)
        noisy, timesteps = torch.randn(1, 4, 16, 16), torch.tensor([100])
        tokens = tokenize(miniature.tokenizer, [PROMPT])
        controlled = Controlled(miniature.base, control, torch.rand(1, 3, 128, 128))
        assert torch.equal(controlled(noisy, timesteps, tokens), miniature.base(noisy, timesteps, tokens))
    sizes = {name: parameter.numel() for name, parameter in control.named_parameters() if parameter.requires_grad}
    assert 2 * sum(sizes.values()) < 12_000_000 and all("original" not in name for name in sizes)
