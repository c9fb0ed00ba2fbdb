"""The components of photos that the image encoder learns to predict."""

import pytest
import torch

from hdb_core.errors import HyperNetError
from hdb_core.hypernet import EncoderConfig
from hdb_core.hypernet.encoder import PhotoEncoder
from hdb_core.train.beginning import load_encoder, save_encoder
from hdb_core.train.encoder_loss import PhotoPredictor
from hdb_core.train.face_code import Components, fit_code


@pytest.fixture
def latents():
    """300 photos of 12 numbers, the first of which vary a thousand times as much as the last."""
    scale = torch.logspace(1, -2, 12).view(1, 3, 2, 2)
    return 5 + scale * torch.randn(300, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def true(components, latents):
    return (latents.flatten(1) - components.mean) @ components.directions / components.variance.sqrt()


def test_the_mean_costs_one_and_the_truth_nothing(latents):
    before = torch.get_rng_state()
    components = Components.of(latents)
    assert torch.equal(torch.get_rng_state(), before)
    right = true(components, latents)
    torch.testing.assert_close(components.loss(torch.zeros_like(right), latents), torch.tensor(1.0))
    assert components.loss(right, latents) < 1e-6


def test_a_small_component_counts_as_much_as_the_largest(latents):
    components = Components.of(latents)
    right = true(components, latents)

    def cost(number):
        wrong = right.clone()
        wrong[:, number] = 0
        return components.loss(wrong, latents).item()

    assert components.variance[0] > 100 * components.variance[4]
    assert cost(0) == pytest.approx(cost(4), rel=0.1)
    assert cost(11) < 0.1 * cost(0)


def test_directions_do_not_turn_round_with_the_numbers_they_are_found_from(latents):
    codes, opposite = (Components.of(sign * latents).codes(sign * latents, 12) for sign in (1, -1))
    torch.testing.assert_close(codes, -opposite, atol=1e-3, rtol=0)


def test_an_encoder_without_a_summary_is_refused():
    with pytest.raises(HyperNetError, match=r"Set encoder\.summary"):
        PhotoPredictor(EncoderConfig(image_size=32, token_width=24, summary=0), 8, 10)


WRONG = {
    "holds NaN or infinity": lambda weight: weight.float() * torch.nan,
    "its weights are no floating-point numbers": lambda weight: weight.long(),
}


@pytest.mark.parametrize("said", WRONG)
def test_an_encoder_of_other_numbers_is_refused(tmp_path, said):
    encoder = PhotoEncoder(EncoderConfig(image_size=32, token_width=24))
    weights, path = encoder.state_dict(), tmp_path / "encoder.safetensors"
    save_encoder({name: weight.half() for name, weight in weights.items()}, path)
    load_encoder(encoder, path)
    save_encoder(weights | {name: WRONG[said](weight) for name, weight in list(weights.items())[-1:]}, path)
    with pytest.raises(HyperNetError, match=rf"'encoder\.safetensors' .*{said}"):
        load_encoder(encoder, path)


def test_the_face_code_has_what_is_shared_and_not_what_is_not(latents):
    """Of tokens that hold half of the components, a thousand times apart in size, and noise."""
    generator = torch.Generator().manual_seed(1)
    components = Components.of(latents)
    right = true(components, latents)
    scale = torch.logspace(0, -3, 6)
    tokens = torch.cat([scale * right[:, :6], torch.randn(300, 10, generator=generator)], 1) + 3
    torch.testing.assert_close(components.codes(latents, 8), right[:, :8])
    mean, to_code = fit_code(tokens, components.codes(latents, 8))
    code = (tokens - mean) @ to_code
    assert code.shape == (300, 8)
    torch.testing.assert_close(code[:, :6], right[:, :6], atol=0.3, rtol=0)
    assert code[:, 6:].std() < 0.5
    assert components.codes(latents, 20).shape == (300, 20) and not components.codes(latents, 20)[:, 12:].any()


@pytest.mark.parametrize("people", [1, 2])
def test_a_check_on_very_few_people_has_a_face_code(people):
    latents, tokens = torch.randn(people, 4, 4, 4), torch.randn(people, 6)
    found = fit_code(tokens, Components.of(latents).codes(latents, 3))
    assert all(bool(part.isfinite().all()) for part in found)
