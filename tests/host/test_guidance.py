"""Guidance towards a person: the negative pass lacks a part of them, the positive one nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

CFG = 4.0  # of the sample fixture


@pytest.fixture
def apply(apply):
    def execute(lidb, guidance, model=None, strength=1.0):
        return apply(lidb, model, strength_model=strength, strength_clip=0.0, person_guidance=guidance)[0]

    return execute


@pytest.fixture
def passes(loaded, sample):
    """What a MODEL predicts in the first step: ``positive`` and ``negative``, on the same noise for every MODEL."""

    def execute(model, **options):
        seen = []

        def watch(arguments):
            seen.append(SimpleNamespace(positive=arguments["cond_denoised"], negative=arguments["uncond_denoised"]))
            return arguments["input"] - arguments["uncond_denoised"]

        clone = model.clone()
        clone.set_model_sampler_cfg_function(watch)
        sample(clone, loaded.clip, **options)
        return seen[0]

    return execute


def close(a, b):
    # The host rounds patched weights to float16.
    assert (a - b).abs().mean() < 0.01 * a.abs().mean()


def far(a, b):
    assert (a - b).abs().mean() > 0.05 * a.abs().mean()


def test_guidance_of_one_is_a_lora(apply, person, loaded):
    assert apply(person(1), 1.0).model_options == loaded.model.model_options


@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize(("guidance", "left"), [(2.5, 0.5), (CFG, 0.0), (5.5, -0.5), (10.0, -1.0)])
def test_the_negative_pass_has_what_is_left_of_the_person(apply, person, passes, guidance, left, convolutions):
    lidb = person(1, convolutions=convolutions)
    plain, part, guided = apply(lidb, 1.0), apply(lidb, 1.0, strength=left), apply(lidb, guidance)
    plain, part, guided = passes(plain), passes(part), passes(guided)
    assert torch.equal(guided.positive, plain.positive)
    close(part.negative, guided.negative)
    far(plain.negative, guided.negative)


def test_strength_scales_what_is_taken(apply, person, passes):
    lidb = person(1)
    guided = passes(apply(lidb, CFG, strength=-0.6))
    close(passes(apply(lidb, 1.0, strength=0.0)).negative, guided.negative)
    assert torch.equal(guided.positive, passes(apply(lidb, 1.0, strength=-0.6)).positive)


def test_two_people_each_with_their_own_guidance(apply, person, passes):
    first, second = person(1), person(2)
    both = passes(apply(second, 2.5, apply(first, CFG)))
    close(passes(apply(second, 1.0, strength=0.5)).negative, both.negative)
    assert torch.equal(both.positive, passes(apply(second, 1.0, apply(first, 1.0))).positive)


def test_without_cfg_it_is_a_lora(apply, host, person, loaded):
    """At a cfg of 1 the host leaves the negative pass out."""
    encode, sampler = host.stock["CLIPTextEncode"]().encode, host.stock["KSampler"]()
    positive, negative = encode(loaded.clip, "a [v] face")[0], encode(loaded.clip, "")[0]
    latent = host.stock["EmptyLatentImage"]().generate(64, 64, 1)[0]
    pictures = [
        sampler.sample(apply(person(1), g), 3, 2, 1.0, "euler", "normal", positive, negative, latent)[0]["samples"]
        for g in (1.0, 2.0)
    ]
    assert torch.equal(*pictures)


def test_pictures_cut_into_tiles(apply, host, person, passes):
    """Stock HyperTile puts parts of a picture beside each other in the batch."""
    from comfy_extras.nodes_hypertile import HyperTile

    def tiled(model):
        patched = HyperTile.execute(model, tile_size=32, swap_size=1, max_depth=1, scale_depth=False)
        return passes(getattr(patched, "args", patched)[0], size=128)

    lidb = person(1)
    guided, plain = tiled(apply(lidb, CFG)), tiled(apply(lidb, 1.0))
    assert torch.equal(guided.positive, plain.positive)
    assert not torch.equal(plain.positive, passes(apply(lidb, 1.0), size=128).positive)  # it does cut
    close(tiled(apply(lidb, 1.0, strength=0.0)).negative, guided.negative)
    far(plain.negative, guided.negative)


@pytest.mark.parametrize("pictures", [1, 2])
def test_tiles_that_each_have_all_parts(apply, person, passes, pictures):
    """Tiled Diffusion makes a batch of tiles, each with its negative and its positive part."""

    def tiled(model):
        clone = model.clone()
        clone.set_model_unet_function_wrapper(twice)
        return passes(clone, pictures=pictures)

    def twice(apply_model, given):
        x, sigma, cond = given["input"], given["timestep"], dict(given["c"])
        cond["c_crossattn"] = cond["c_crossattn"].repeat(2, 1, 1)
        first, second = apply_model(x.repeat(2, 1, 1, 1), sigma.repeat(2), **cond).chunk(2)
        close(first, second)
        return first

    guided = apply(person(1), CFG)
    expected, cut = passes(guided, pictures=pictures), tiled(guided)
    close(cut.negative, expected.negative)
    close(cut.positive, expected.positive)
    far(cut.positive, cut.negative)


def test_nothing_stays_on_the_layers(apply, person, loaded, sample, fingerprint):
    before = fingerprint(same_objects=False)
    guided = apply(person(1), 2.0)
    first = sample(guided, loaded.clip)
    assert fingerprint(same_objects=False) == before
    assert torch.equal(first, sample(guided, loaded.clip))
    assert not torch.equal(first, sample(apply(person(1), 1.0), loaded.clip))


def test_a_model_that_a_newer_host_reads_anew(apply, person, passes, newer_patchers):
    guided = apply(person(1), CFG)
    expected = passes(guided)
    newer_patchers()
    close(expected.negative, passes(guided.clone(disable_dynamic=True)).negative)
    far(expected.positive, expected.negative)


def test_a_compiled_model(apply, host, person, passes, loaded):
    """What was compiled without hooks, two pictures at a cfg of 1, misses those of two passes of one."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    guided = apply(person(1), CFG)
    expected = passes(guided)
    set_torch_compile_wrapper(guided, backend="eager")
    text = host.stock["CLIPTextEncode"]().encode(loaded.clip, "a [v] face")[0]
    latents = host.stock["EmptyLatentImage"]().generate(64, 64, 2)[0]
    host.stock["KSampler"]().sample(guided, 3, 1, 1.0, "euler", "normal", text, text, latents)
    compiled = passes(guided)
    close(expected.positive, compiled.positive)
    close(expected.negative, compiled.negative)
