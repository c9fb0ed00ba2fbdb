"""LiDB Hook: a person for one prompt, held by the host's own hooks and masks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

CFG = 4.0
OWN = (0.35, 0.5, 4.5)  # strengths of model and clip, and guidance


@pytest.fixture
def somebody(host, person):
    """A person with strengths of their own."""

    def make(seed: int):
        lidb = person(seed)
        return replace(lidb, about=replace(lidb.about, strengths=host.module("hdb_core.recommended").Strengths(*OWN)))

    return make


@pytest.fixture
def hooked(host, run, loaded):
    """The conditioning of a prompt with a person's hook, in a part of the picture if there is a mask."""
    from comfy_extras.nodes_hooks import SetClipHooks

    def execute(lidb, mask=None, text="a [v] face", **inputs):
        (hooks,) = run("LiDBHook", model=loaded.model, clip=loaded.clip, lidb=lidb, **{"cfg": CFG, **inputs})
        (clip,) = SetClipHooks().apply_hooks(loaded.clip, False, True, hooks)
        (conditioning,) = host.stock["CLIPTextEncode"]().encode(clip, text)
        if mask is None:
            return conditioning
        return host.stock["ConditioningSetMask"]().append(conditioning, mask, "default", 1.0)[0]

    return execute


@pytest.fixture
def passes(host, loaded):
    """What the first step predicts for a positive and a negative conditioning, (1, 4, 8, 8) each."""

    def execute(positive, negative=None, model=None):
        seen = []

        def watch(arguments):
            seen.append(SimpleNamespace(positive=arguments["cond_denoised"], negative=arguments["uncond_denoised"]))
            return arguments["input"] - arguments["uncond_denoised"]

        clone = (model or loaded.model).clone()
        clone.set_model_sampler_cfg_function(watch)
        negative = negative or host.stock["CLIPTextEncode"]().encode(loaded.clip, "")[0]
        (latent,) = host.stock["EmptyLatentImage"]().generate(64, 64, 1)
        host.stock["KSampler"]().sample(clone, 3, 1, CFG, "euler", "normal", positive, negative, latent)
        return seen[0]

    return execute


def close(a, b):
    # The host rounds patched weights to float16.
    torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.abs().mean()))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_positive_prompt_has_as_much_of_the_person_as_guidance_makes(
    host, apply, somebody, hooked, passes, strength
):
    """The negative pass is that of the base model, so cfg multiplies what the positive one has of the person."""
    lidb = somebody(1)
    seen = passes(hooked(lidb, strength=strength))
    model, clip, guidance = OWN
    whole = strength * model * (1 + strength * (guidance - 1))
    carrying = apply(lidb, strength_model=whole / CFG, strength_clip=strength * clip)
    positive = host.stock["CLIPTextEncode"]().encode(carrying[1], "a [v] face")[0]
    expected, base = passes(positive, model=carrying[0]), passes(positive)
    close(seen.positive, expected.positive)
    close(seen.negative, base.negative)
    assert (expected.positive - base.positive).abs().mean() > 0.02 * base.positive.abs().mean()


def test_strength_zero_is_the_base_model(host, loaded, somebody, hooked, passes):
    plain = host.stock["CLIPTextEncode"]().encode(loaded.clip, "a [v] face")[0]
    # The host samples prompts with hooks one by one, and a batch of one is rounded otherwise than a batch of two.
    hooked_pass = passes(hooked(somebody(1), strength=0.0)).positive
    torch.testing.assert_close(hooked_pass, passes(plain).positive, rtol=1e-3, atol=1e-3)


def test_options_replace_the_strengths_of_the_file(run, somebody, hooked, passes):
    (options,) = run("ApplyOptions", strength_model=OWN[0], strength_clip=OWN[1], person_guidance=OWN[2])
    own, other = somebody(1), replace(somebody(1), about=type(somebody(1).about)())
    assert torch.equal(passes(hooked(own)).positive, passes(hooked(other, options=options)).positive)


def test_two_people_each_in_their_half(host, somebody, hooked, passes):
    left, right = torch.zeros(2, 1, 64, 64)
    left[..., :32], right[..., 32:] = 1, 1
    both = host.stock["ConditioningCombine"]().combine(hooked(somebody(1), left), hooked(somebody(2), right))[0]
    seen = passes(both).positive
    one, other = (passes(hooked(somebody(seed))).positive for seed in (1, 2))
    close(seen[..., :4], one[..., :4])
    close(seen[..., 4:], other[..., 4:])
    assert (one - other).abs().mean() > 0.02 * one.abs().mean()


def test_a_person_of_another_model_is_refused(host, run, sd2, somebody):
    with pytest.raises(host.module("hdb_core.errors").LayoutError, match="made for another model"):
        run("LiDBHook", model=sd2.model, clip=sd2.clip, lidb=somebody(1))
