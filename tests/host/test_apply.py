"""Apply LiDB to Model: exact, on clones only, and chained with LoRA and ControlNet nodes of the host."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the size of the first."""
    return float((a - b).abs().max() / a.abs().mean())


def test_every_layer_is_patched(apply, person):
    model, clip = apply(person(1))
    assert len(model.patches) == 32
    assert len(clip.patcher.patches) == 8
    assert all(len(patches) == 1 for patches in (*model.patches.values(), *clip.patcher.patches.values()))


@pytest.mark.parametrize("changed", ["unet", "nothing"])
def test_layers_that_a_person_leaves_as_they_are_get_no_patch(apply, person, loaded, sample, changed):
    lidb = person(1)
    text = torch.tensor([layer.is_text for layer in lidb.layout.layers])
    model, clip = apply(replace(lidb, up=lidb.up * (~text & (changed == "unet"))[:, None, None]))
    assert (len(model.patches), len(clip.patcher.patches)) == (32 * (changed == "unet"), 0)
    assert torch.equal(sample(model, clip), sample(loaded.model, loaded.clip)) == (changed == "nothing")


def test_merged_weights_are_exact(apply, host, person, loaded):
    lidb = person(1)
    model, clip = apply(lidb, strength_model=0.7, strength_clip=-0.4)
    keys = host.module("hdb_core.layout").host_keys(lidb.layout)
    delta_weight = host.module("hdb_core.lidb").delta_weight
    for index, layer in enumerate(lidb.layout.layers):
        patcher, strength = (clip.patcher, -0.4) if layer.is_text else (model, 0.7)
        weight = loaded_weight(patcher, keys[layer.name])
        merged = merged_weight(patcher, keys[layer.name])
        torch.testing.assert_close(merged, weight.float() + strength * delta_weight(lidb, index), rtol=0, atol=1e-5)


def loaded_weight(patcher, key: str) -> torch.Tensor:
    return patcher.model_state_dict()[key]


def merged_weight(patcher, key: str) -> torch.Tensor:
    import comfy.lora

    weight = loaded_weight(patcher, key).float()
    return comfy.lora.calculate_weight(patcher.patches[key], weight.clone(), key)


def test_patch_equals_the_training_path(apply, host, person, loaded, monkeypatch):
    """What training sees through its output-side path is what sampling gets from the patches."""
    differentiable = host.module("nodes.host.differentiable").differentiable
    attach = host.module("hdb_core.adapters").attach
    expand = host.module("hdb_core.lidb").expand
    monkeypatch.setattr(host.module("nodes.host.denoiser"), "autocast_dtype", lambda device: None)
    lidb = person(1)
    noisy, sigma = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([2.0, 0.5])

    def predict(model, clip, factors):
        with (
            differentiable(model, clip) as denoiser,
            attach(denoiser.modules, factors),
            torch.no_grad(),
        ):
            conditioning = denoiser.encode_prompts(["a [v] face", "a face"])
            return torch.cat([p.text for p in conditioning.prompts]), denoiser.denoise(
                noisy.clone(), sigma.clone(), conditioning
            )

    base_text, base = predict(loaded.model, loaded.clip, {})
    hook_text, hooked = predict(loaded.model, loaded.clip, expand(lidb))
    patch_text, patched = predict(*apply(lidb), {})
    assert difference(base, hooked) > 0.1
    assert difference(base_text, hook_text) > 0.1
    # The host stores text weights in float16, so its merged weights are rounded.
    assert difference(hook_text, patch_text) < 0.02
    assert difference(hooked, patched) < 0.02


def test_strength_zero_is_the_base_bit_for_bit(run, person, loaded, sample):
    model, clip = run("ApplyLiDBToModel", model=loaded.model, clip=loaded.clip, lidb=person(1), strength=0.0)
    assert model is not loaded.model and clip is not loaded.clip
    assert model.patches == {} == clip.patcher.patches
    assert model.model_options == loaded.model.model_options and model.wrappers == loaded.model.wrappers
    assert torch.equal(sample(model, clip), sample(loaded.model, loaded.clip))


@pytest.mark.parametrize("own", [(0.7, 0.5, 2.5), (0.35, 0.5, 4.5), (0.2, -0.3, 1.0)])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.5])
def test_strength_scales_what_the_file_says(run, apply, host, person, sample, loaded, own, strength):
    """Model and clip scale with it, guidance is 1 + strength · (guidance - 1)."""
    lidb = person(1)
    strengths = host.module("hdb_core.recommended").Strengths(*own)
    lidb = replace(lidb, about=replace(lidb.about, strengths=strengths))
    by_file = run("ApplyLiDBToModel", model=loaded.model, clip=loaded.clip, lidb=lidb, strength=strength)
    model, clip, guidance = own
    numbers = {"strength_model": strength * model, "strength_clip": strength * clip}
    by_hand = apply(lidb, **numbers, person_guidance=1 + strength * (guidance - 1))
    assert torch.equal(sample(*by_file), sample(*by_hand))


def test_without_options_the_strengths_are_those_of_the_file(run, host, person, loaded, monkeypatch):
    seen = []
    monkeypatch.setattr(host.module("nodes.apply"), "apply_lidb", lambda *given: (seen.append(given[3]), given)[1][:2])
    recommended = host.module("hdb_core.recommended")
    for one in recommended.RECOMMENDED.values():
        lidb = replace(person(1), about=host.module("hdb_core.lidb").About(strengths=one.strengths))
        run("ApplyLiDBToModel", model=loaded.model, clip=loaded.clip, lidb=lidb)
        assert seen[-1] == one.strengths


def test_options_replace_the_strengths_of_the_file(run, apply, person, loaded, sample):
    """1, 1 and 1 are a plain LoRA; strength scales them, too."""
    lidb = person(1)
    model, clip = apply(lidb)
    assert model.model_options == loaded.model.model_options
    by_file = run("ApplyLiDBToModel", model=loaded.model, clip=loaded.clip, lidb=lidb)
    assert not torch.equal(sample(model, clip), sample(*by_file))
    half = apply(lidb, strength=0.5, person_guidance=3.0)
    direct = apply(lidb, strength_model=0.5, strength_clip=0.5, person_guidance=2.0)
    assert torch.equal(sample(*half), sample(*direct))


def test_a_person_with_one_layer_changes_that_layer(host, person, apply):
    """Its name alone does not say how many blocks a level of the model has."""
    whole = person(1, convolutions=True)
    keys = host.module("hdb_core.layout").host_keys(whole.layout)
    for i, layer in enumerate(whole.layout.layers):
        alone = replace(whole.layout, layers=(layer,))
        model, clip = apply(replace(whole, layout=alone, down=whole.down[[i]], up=whole.up[[i]]))
        assert {*model.patches, *clip.patcher.patches} == {keys[layer.name]}


def test_bases_are_made_once_for_a_loaded_model_and_go_with_it(host, person, loaded, apply, monkeypatch):
    bases, made = host.module("nodes.host.bases"), []
    monkeypatch.setattr(bases, "_OF_MODEL", weakref.WeakKeyDictionary())
    monkeypatch.setattr(
        bases, "Adapters", lambda *given: made.append(given) or host.module("hdb_core.adapters").Adapters(*given)
    )
    model, _ = apply(person(1))
    apply(person(2), model=model)
    assert len(made) == 1
    apply(person(2, convolutions=True))
    assert len(made) == 2
    other = SimpleNamespace(model=torch.nn.Linear(1, 1))
    bases.adapters_of(other, *made[0])
    assert len(bases._OF_MODEL) == 2
    del other
    gc.collect()
    assert list(bases._OF_MODEL) == [loaded.model.model]


def test_bases_of_strangers_do_not_fill_the_memory(host, person, loaded, apply, monkeypatch):
    """Each file names a basis of its own; of SDXL, one takes half a gigabyte."""
    bases = host.module("nodes.host.bases")
    monkeypatch.setattr(bases, "_OF_MODEL", weakref.WeakKeyDictionary())
    for seed in (0, 1, 0, 2):
        lidb = person(1)
        apply(replace(lidb, basis=replace(lidb.basis, seed=seed)))
    (kept,) = bases._OF_MODEL.values()
    assert [recipe.seed for recipe, _ in kept] == [0, 2]


def test_a_basis_that_takes_minutes_and_gigabytes_is_refused_at_once(host, person, loaded, monkeypatch):
    """A file of 4 KB can ask for 1,024 dimensions: those of SD 1.5 take 1 GB, those of SDXL 7 GB and minutes."""
    bases, layout = host.module("nodes.host.bases"), host.module("hdb_core.layout")
    layers = (layout.Layer(f"unet.mid_block.{i}", 1280, 1280) for i in range(560))
    large = replace(person(1).basis, down_dim=1024, up_dim=1024)
    monkeypatch.setattr(bases, "Adapters", lambda *_: pytest.fail("it was made"))
    with pytest.raises(host.module("hdb_core.errors").BasisError, match=r"1024 × 1024 dimensions.*560 layers"):
        bases.adapters_of(loaded.model, large, layout.Layout("sdxl", tuple(layers)))


@pytest.mark.parametrize(("strength_model", "strength_clip"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (-1.0, 1.0)])
def test_each_strength_counts(apply, person, loaded, sample, strength_model, strength_clip):
    picture = sample(*apply(person(1), strength_model=strength_model, strength_clip=strength_clip))
    assert torch.isfinite(picture).all()
    assert difference(picture, sample(loaded.model, loaded.clip)) > 1e-3
    assert difference(picture, sample(*apply(person(1)))) > 1e-3


def test_inputs_are_not_mutated(apply, person, fingerprint, sample):
    before = fingerprint(same_objects=False)
    lidb = person(1)
    down, up = lidb.down.clone(), lidb.up.clone()
    sample(*apply(lidb))
    assert fingerprint(same_objects=False) == before
    assert torch.equal(down, lidb.down)
    assert torch.equal(up, lidb.up)


def test_two_people_do_not_clobber_each_other(apply, person, sample):
    first, second = apply(person(1)), apply(person(2))
    one, two = sample(*first), sample(*second)
    assert difference(one, two) > 1e-3
    assert torch.equal(one, sample(*first))
    assert torch.equal(two, sample(*second))


def test_a_strangers_token_is_shown_in_one_line(apply, person, said, caplog):
    """On the node and in the terminal, which control characters would steer."""
    lidb = person(1)
    lidb = replace(lidb, about=replace(lidb.about, token="[v]\x1b[2J\r\u202e\u2028" + "x" * 1000))
    apply(lidb, *apply(lidb))
    (line,) = (record.args[0] for record in caplog.records if record.name == "hyperdreambooth")
    assert "called [v] [2J xxx" in line and len(line) < 600 and line.isprintable()
    assert said[-1].startswith(line)


def test_two_people_in_a_row_are_said_to_be_a_mixture(apply, run, loaded, person, said, caplog):
    """With what to do instead; and by name where all answer to the same word."""
    first, second = person(1), person(2)
    other = replace(second, about=replace(second.about, token="[w]"))
    numbers = "strength_model 1, strength_clip 1, person_guidance 1: those of Apply Options"
    instead = "For two people in one picture use LiDB Hook, as the template '09 two saved people side by side' does."
    model, clip = apply(first)
    assert said[-1] == numbers and not caplog.text
    two, _ = apply(second, model, clip)
    assert said[-1] == f"The faces become a mixture of 2 people, all of them called [v]. {instead}\n{numbers}"
    assert "mixture" in caplog.text
    apply(other, model, clip)
    assert said[-1] == f"The faces become a mixture of 2 people. {instead}\n{numbers}"
    apply(first, two, clip)
    assert said[-1].startswith("The faces become a mixture of 3 people, all of them called [v].")
    none, _ = run("ApplyLiDBToModel", model=loaded.model, clip=loaded.clip, lidb=first, strength=0.0)
    for plain in (loaded.model, none):  # the base model knows of nobody, whatever was made of it
        apply(second, plain)
        assert said[-1] == numbers


def test_the_node_says_where_its_strengths_come_from(host, loaded, run, person, said):
    own = host.module("hdb_core.recommended").Strengths(0.35, 0.5, 4.5)
    lidb = replace(person(1), about=replace(person(1).about, strengths=own))
    models = {"model": loaded.model, "clip": loaded.clip}
    run("ApplyLiDBToModel", **models, lidb=lidb, strength=1.0)
    assert said[-1] == "strength_model 0.35, strength_clip 0.5, person_guidance 4.5: recommended for this person"
    run("ApplyLiDBToModel", **models, lidb=lidb, strength=0.5)
    half = "strength_model 0.175, strength_clip 0.25, person_guidance 2.75"
    assert said[-1] == f"{half}: recommended for this person, times a strength of 0.5"
    run("ApplyLiDBToModel", **models, lidb=lidb, strength=0.5, options=own)
    assert said[-1] == f"{half}: those of Apply Options, times a strength of 0.5"


@pytest.fixture
def stock_lora(host, base_directory):
    """A random LoRA file for some layers, read by the stock Load LoRA node."""
    generator = torch.Generator().manual_seed(9)
    weights = {}
    for prefix, width in (
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", 320),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2", (320, 1280)),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", (3072, 768)),
    ):
        out_features, in_features = width if isinstance(width, tuple) else (width, width)
        weights[f"{prefix}.lora_up.weight"] = torch.randn(out_features, 4, generator=generator) * 0.1
        weights[f"{prefix}.lora_down.weight"] = torch.randn(4, in_features, generator=generator) * 0.1
    path = base_directory / "models" / "loras" / "style.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)
    return lambda model, clip: host.stock["LoraLoader"]().load_lora(model, clip, path.name, 1.0, 1.0)


def test_chains_with_a_stock_lora_in_any_order(apply, person, loaded, sample, stock_lora):
    lora_only = sample(*stock_lora(loaded.model, loaded.clip))
    person_only = sample(*apply(person(1)))
    model, clip = stock_lora(loaded.model, loaded.clip)
    lora_first = sample(*apply(person(1), model, clip))
    person_first = sample(*stock_lora(*apply(person(1))))
    assert difference(lora_first, person_first) < 0.05
    assert difference(lora_first, lora_only) > 0.2
    assert difference(lora_first, person_only) > 0.2


@pytest.fixture
def control(host, base_directory):
    """A random ControlNet through the stock nodes, as a function of (positive, negative)."""
    import comfy.cldm.cldm
    import comfy.ops

    builder = host.load_file("random_checkpoint.py")
    generator = torch.Generator().manual_seed(4)
    config = {
        key: value
        for key, value in builder.MINIATURE_UNET.items()
        if key not in ("out_channels", "transformer_depth_output")
    }
    weights = builder.state_dict_of(
        lambda: comfy.cldm.cldm.ControlNet(**config, hint_channels=3, operations=comfy.ops.disable_weight_init),
        generator,
    )
    path = base_directory / "models" / "controlnet" / "random.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"control_model.{key}": weight for key, weight in weights.items()}, path)
    net = host.stock["ControlNetLoader"]().load_controlnet(path.name)[0]
    hint = torch.rand(1, 64, 64, 3, generator=generator)
    add = host.stock["ControlNetApplyAdvanced"]().apply_controlnet
    return lambda positive, negative: add(positive, negative, net, hint, 0.3, 0.0, 1.0)


def test_chains_with_a_stock_controlnet(apply, person, loaded, sample, control):
    pictures = SimpleNamespace(
        base=sample(loaded.model, loaded.clip),
        controlled=sample(loaded.model, loaded.clip, control=control),
        person=sample(*apply(person(1))),
        both=sample(*apply(person(1)), control=control),
    )
    assert difference(pictures.person, pictures.both) > 1e-3  # control changes the picture
    assert difference(pictures.controlled, pictures.both) > 1e-3  # the person is still there
    assert torch.equal(pictures.person, sample(*apply(person(1))))
    assert torch.equal(pictures.base, sample(loaded.model, loaded.clip))
