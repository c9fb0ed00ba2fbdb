"""Guidance towards a person: the negative pass lacks a part of them; what that cannot bring, the positive one has more."""

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
@pytest.mark.parametrize(("guidance", "left"), [(2.5, 0.5), (CFG, 0.0), (5.5, -0.5), (7.0, -1.0)])
def test_the_negative_pass_has_what_is_left_of_the_person(apply, person, passes, guidance, left, convolutions):
    lidb = person(1, convolutions=convolutions)
    plain, part, guided = apply(lidb, 1.0), apply(lidb, 1.0, strength=left), apply(lidb, guidance)
    plain, part, guided = passes(plain), passes(part), passes(guided)
    assert torch.equal(guided.positive, plain.positive)
    close(part.negative, guided.negative)
    far(plain.negative, guided.negative)


def test_a_low_cfg_leaves_the_rest_to_the_positive_pass(apply, person, passes):
    """Of 10 − 1, the negative pass brings 2 · (4 − 1), and each 1 in the positive one 4."""
    guided = passes(apply(person(1), 10.0))
    close(passes(apply(person(1), 1.0, strength=-1.0)).negative, guided.negative)
    close(passes(apply(person(1), 1.0, strength=1.75)).positive, guided.positive)
    far(passes(apply(person(1), 1.0)).positive, guided.positive)


@pytest.mark.parametrize("cfg", [1.0, 1.01, 1.5, 2.0, 2.75, 4.0, 8.0])
def test_the_person_counts_as_much_at_any_cfg(host, cfg):
    positive, negative = (1 + share for share in host.module("nodes.host.guidance").shares(4.5, cfg))
    assert negative + cfg * (positive - negative) == pytest.approx(4.5)
    assert negative >= -1 and positive >= 1


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


def test_without_a_negative_pass_the_person_counts_as_much(apply, host, person, loaded):
    """At a cfg of 1 the host leaves the negative pass out; strength · guidance is then the strength."""
    encode, sampler = host.stock["CLIPTextEncode"]().encode, host.stock["KSampler"]()
    positive, negative = encode(loaded.clip, "a [v] face")[0], encode(loaded.clip, "")[0]
    latent = host.stock["EmptyLatentImage"]().generate(64, 64, 1)[0]
    guided, strong, weak = (
        sampler.sample(model, 3, 2, 1.0, "euler", "normal", positive, negative, latent)[0]["samples"]
        for model in (
            apply(person(1), 2.5, strength=0.2),
            apply(person(1), 1.0, strength=0.5),
            apply(person(1), 1.0, strength=0.2),
        )
    )
    close(strong, guided)
    far(strong, weak)


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


@pytest.fixture
def seen(host, loaded):
    """What every call for a batch of passes gave in the first step of a guider: lists of predictions."""
    import comfy.samplers
    from comfy.patcher_extension import WrappersMP

    def execute(model, guider, *cfg, conds=3):
        calls = []

        def watch(executor, *given):
            calls.append(executor(*given))
            return calls[-1]

        encode = host.stock["CLIPTextEncode"]().encode
        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "watch", watch)
        made = guider(clone)
        made.set_conds(*(encode(loaded.clip, text)[0] for text in ("a [v] face", "a hat", "")[:conds]))
        made.set_cfg(*cfg)
        latent = torch.zeros(1, 4, 8, 8)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
        sampler = comfy.samplers.sampler_object("euler")
        made.sample(noise, latent, sampler, torch.tensor([14.0, 13.0]))
        return calls

    return execute


def guider(name):
    from comfy_extras import nodes_custom_sampler, nodes_perpneg

    return getattr(nodes_perpneg, name, None) or getattr(nodes_custom_sampler, name)


@pytest.mark.parametrize(
    ("name", "cfg", "guidance", "positive"),
    [
        ("Guider_PerpNeg", (CFG, 1.0), 2.5, 0),
        ("Guider_PerpNeg", (CFG, 0.0), 2.5, 0),
        ("Guider_DualCFG", (CFG, 2.0), 2.5, 2),
        ("Guider_DualCFG", (2.0, 2.0, True), 2.5, 2),
    ],
)
def test_guiders_of_three_passes(apply, person, seen, name, cfg, guidance, positive):
    """All that the positive prompt is led away from lacks the same part of the person, wherever it stands."""
    lidb, guider_of = person(1), guider(name)
    plain, part, guided = (apply(lidb, g, strength=s) for g, s in ((1.0, 1.0), (1.0, 0.5), (guidance, 1.0)))
    (plain,), (part,), (guided,) = (seen(model, guider_of, *cfg) for model in (plain, part, guided))
    for index, (all_of_them, half, own) in enumerate(zip(plain, part, guided, strict=True)):
        if index == positive:
            assert torch.equal(own, all_of_them)
        elif own.any():  # a pass that does not count is left out
            close(half, own)
            far(all_of_them, own)


def test_a_negative_pass_by_itself_is_a_negative_pass(apply, person, seen):
    """Self-attention guidance evaluates it once more, alone."""
    import comfy.samplers
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    def with_sag(model):
        patched = SelfAttentionGuidance.execute(model, 0.5, 2.0)
        calls = seen(getattr(patched, "args", patched)[0], comfy.samplers.CFGGuider, CFG, conds=2)
        (positive, negative), (alone,) = calls
        return SimpleNamespace(positive=positive, negative=negative, alone=alone)

    lidb = person(1)
    guided, half = with_sag(apply(lidb, 2.5)), with_sag(apply(lidb, 1.0, strength=0.5))
    close(half.negative, guided.negative)
    close(half.alone, guided.alone)


def test_a_prompt_with_an_area_has_a_negative_pass_of_its_own(apply, host, loaded, person, seen):
    """The host makes it up from the positive one."""
    import comfy.samplers

    class InAnArea(comfy.samplers.CFGGuider):
        def set_conds(self, positive, negative):
            area = host.stock["ConditioningSetArea"]().append(positive, 64, 32, 0, 0, 1.0)[0]
            super().set_conds(positive + area, negative)

    plain, part, guided = (apply(person(1), g, strength=s) for g, s in ((1.0, 1.0), (1.0, 0.5), (2.5, 1.0)))
    (plain,), (part,), (guided,) = (seen(model, InAnArea, CFG, conds=2) for model in (plain, part, guided))
    assert torch.equal(guided[0], plain[0])
    close(part[1], guided[1])


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_merged_model_has_as_much_guidance_as_it_has_of_the_person(apply, person, passes, loaded, ratio):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    (merged,) = ModelMergeSimple().merge(apply(person(1), 2.5), loaded.model, ratio)
    own, base = passes(merged), passes(loaded.model)
    close(passes(apply(person(1), 1.0, strength=ratio)).positive, own.positive)
    close(passes(apply(person(1), 1.0, strength=ratio / 2)).negative, own.negative)
    if ratio:
        far(base.positive, own.positive)


def test_what_a_saved_checkpoint_lacks_is_said(apply, person, passes, caplog):
    import comfy.model_management

    guided = apply(person(1), 2.5)
    passes(guided)
    assert not caplog.records
    comfy.model_management.load_models_gpu([guided], force_patch_weights=True)
    assert "without person_guidance" in caplog.text
    caplog.clear()
    comfy.model_management.load_models_gpu([apply(person(1), 1.0)], force_patch_weights=True)
    assert not caplog.records


def test_the_layers_that_read_the_same_share_its_product(apply, host, person, passes, monkeypatch):
    """to_q, to_k and to_v of self-attention; to_k and to_v of all cross-attention, which read the same text."""
    rows = host.module("hdb_core.rows")
    found, down = [], rows.RowChange._down
    monkeypatch.setattr(rows.RowChange, "_down", lambda *given: (found.append(given[1]), down(*given))[1])
    lidb = person(1)
    passes(apply(lidb, 2.5))
    first = found[: sum(not layer.is_text for layer in lidb.layout.layers)]
    assert {len(names) for names in first} == {1}  # the first pass sees who reads what
    (text,) = {names for names in found if len(names) > 3}
    assert all(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for name in text)
    assert {tuple(name.split(".")[-2] for name in names) for names in found if len(names) == 3} == {
        ("to_q", "to_k", "to_v")
    }


def test_its_memory_goes_with_the_sampling(apply, host, person, passes):
    guided = apply(person(1), 2.5)
    (wrapper,) = guided.get_wrappers("outer_sample", "hyperdreambooth")
    passes(guided)
    change = wrapper.__self__._change
    assert not (change.factors or change._ups or change._downs or change._products)
