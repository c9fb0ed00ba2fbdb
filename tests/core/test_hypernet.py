"""The hypernetwork: shapes, live gradients, refinement, several photos, and its file."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import ViTConfig, ViTModel

from hdb_core.adapters import Adapters, attach
from hdb_core.basis import BasisRecipe
from hdb_core.diffusion import Batch, diffusion_loss
from hdb_core.errors import HyperNetError, HyperNetFileError
from hdb_core.files import hypernet as hypernet_file
from hdb_core.files import lidb as lidb_file
from hdb_core.files.container import checksum
from hdb_core.hypernet import EncoderConfig, HyperNet, HyperNetConfig, predict, preprocess
from hdb_core.hypernet.encoder import PhotoEncoder, initialised
from hdb_core.layout import Layer, Layout
from hdb_core.lidb import About, core, delta_weight
from hdb_core.recommended import FROM_PREDICTION, PREDICTED_BY_TOKEN, RECOMMENDED

ROOT = Path(__file__).resolve().parents[2]
ENCODER = EncoderConfig(image_size=32, token_width=24, patch_size=8, stem=((16, 1),), depth=2, heads=2)


@pytest.fixture
def config(toy, recipe):
    return HyperNetConfig(toy.layout, recipe, ENCODER, width=32, depth=2, heads=2, code=5)


@pytest.fixture
def net(config):
    return HyperNet.create(config, seed=1).eval()


def photos(count, seed=0, size=40):
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(seed))


def tokens_of(net, images):
    with torch.no_grad():
        return net.encode(preprocess(images, net.config.encoder))


def rewrite(path, edit):
    """Save a file again with another header and an honest checksum."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    fields, tensors = (
        json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["hypernet"]),
        safetensors.torch.load(data),
    )
    edit(fields)
    fields["checksum"] = checksum(fields, tensors)
    path.write_bytes(safetensors.torch.save(tensors, {"hypernet": json.dumps(fields)}))


@pytest.mark.parametrize(
    "stem, tokens", [((), 64), (((16, 1),), 64), (((16, 1), (24, 2)), 16), (((8, 0), (16, 1), (16, 1)), 4)]
)
def test_encoder_has_a_token_for_each_place_or_a_summary(stem, tokens):
    encoder = replace(ENCODER, patch_size=4, stem=stem)
    for summary, count in ((0, 1 + tokens), (3, 3)):
        with initialised(0):
            net = PhotoEncoder(replace(encoder, summary=summary))
        assert net(preprocess(photos(2), encoder)).shape == (2, count, 24)


@pytest.mark.parametrize("predict_down", [False, True])
@pytest.mark.parametrize("rank", [1, 3])
def test_every_predicted_factor_has_a_gradient_at_step_0(toy, recipe, rank, predict_down):
    """Through the frozen model, with another person for every sample."""
    config = HyperNetConfig(toy.layout, recipe, ENCODER, 32, 2, 2, rank=rank, code=5, predict_down=predict_down)
    net = HyperNet.create(config)
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(4, 5, generator=generator)
    down, up = net(net.encode(preprocess(photos(4), ENCODER)), code=known)
    assert down.shape == (4, len(toy.layout.layers), rank, recipe.down_dim)
    assert up.shape == (4, len(toy.layout.layers), recipe.up_dim, rank)
    factors = (up, down) if predict_down else (up,)
    for factor in factors:
        factor.retain_grad()
    latents, noise = torch.randn(2, 4, 4, 6, 6, generator=generator)
    sigma = toy.sigmas()[torch.tensor([40, 90, 130, 180])]
    batch = Batch(latents, noise, sigma, torch.ones(4, 1, 6, 6), torch.full((4,), 0.25))
    with attach(toy.modules, Adapters(recipe, toy.layout).expand(down, up)):
        text = toy.encode_prompts(["a [v] face"] * 4)
        diffusion_loss(toy, batch, text).backward()
    for factor in factors:
        assert (factor.grad.flatten(2).norm(dim=-1) > 0).all()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_each_iteration_refines_the_last(net):
    tokens = tokens_of(net, photos(2))
    with torch.no_grad():
        states = net.refinements(tokens, 3)
        _, up = net(tokens, 2)
    assert len(states) == 3 and not torch.equal(states[0], states[1])
    torch.testing.assert_close(net.factors(states[1])[1], up)
    torch.testing.assert_close(net(tokens)[1], up)  # the configured number


def test_photos_of_one_person_have_no_order_and_all_count(net):
    tokens = tokens_of(net, photos(3))
    person, turned, fewer = (predict(net, t) for t in (tokens, tokens.flip(0), tokens[:2]))
    torch.testing.assert_close(person.up, turned.up)
    assert not torch.allclose(person.up, fewer.up)
    assert person.about == About(FROM_PREDICTION, photos=3, strengths=RECOMMENDED[FROM_PREDICTION].strengths)


def test_whom_the_token_alone_means_is_applied_as_such(config):
    alone = HyperNet.create(replace(config, by_token=True))
    assert predict(alone, tokens_of(alone, photos(1))).about.strengths == PREDICTED_BY_TOKEN


def test_a_prediction_names_its_token(config):
    plain = HyperNet.create(replace(config, prompt="a sks face"))
    assert predict(plain, tokens_of(plain, photos(1))).about.token == "sks"


def test_a_prediction_is_a_person_like_any_other(net, tmp_path):
    person = predict(net, tokens_of(net, photos(1)))
    assert person.rank == 1 and delta_weight(person, 0).any()
    lidb_file.save(person, tmp_path / "p.safetensors")
    torch.testing.assert_close(core(lidb_file.load(tmp_path / "p.safetensors")), core(person), atol=1e-4, rtol=1e-3)


def test_creation_is_repeatable_and_leaves_the_global_generator_alone(config):
    before = torch.random.get_rng_state()
    first, second, other = (HyperNet.create(config, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["readout"], other["readout"])


def test_preprocessing_takes_the_central_square():
    image = photos(1, size=64)
    wide = torch.zeros(1, 64, 100, 3)
    wide[:, :, 18:82] = image
    # The filter of the outermost columns reaches two pixels of the result beyond the square.
    torch.testing.assert_close(preprocess(wide, ENCODER)[..., 2:-2], preprocess(image, ENCODER)[..., 2:-2])
    for alpha, seen in ((1.0, image), (0.0, torch.ones_like(image))):  # what is transparent lies on white
        with_alpha = torch.cat([image, torch.full((1, 64, 64, 1), alpha)], -1)
        torch.testing.assert_close(preprocess(with_alpha, ENCODER), preprocess(seen, ENCODER))
    assert preprocess(image, ENCODER).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 64, 64, 3), "There is no photo"),
        (torch.zeros(64, 64, 3), "batch, height, width, 3"),
        (torch.zeros(1, 64, 64, 2), "batch, height, width, 3"),
        (torch.zeros(1, 1, 1, 3), "at least 16 pixels"),
        (torch.full((1, 64, 64, 3), torch.nan), "NaN"),
    ],
)
def test_unusable_photos(images, message):
    with pytest.raises(HyperNetError, match=message):
        preprocess(images, ENCODER)


def test_wrong_tokens_and_broken_weights(net):
    with pytest.raises(HyperNetError, match="width 24"):
        predict(net, torch.zeros(1, 5, 23))
    tokens = tokens_of(net, photos(1))
    net.readout.data[0] = torch.nan
    with pytest.raises(HyperNetError, match="NaN"):
        predict(net, tokens)


def test_a_hypernetwork_for_clip_vision_says_so(toy, recipe):
    encoder = EncoderConfig("clip_vision", 224, 24, name="ViT-H-14", num_tokens=257)
    net = HyperNet.create(HyperNetConfig(toy.layout, recipe, encoder, 32, 2, 2, code=5))
    assert not any(name.startswith("encoder.") for name in net.state_dict())
    with pytest.raises(HyperNetError, match=r"ViT-H-14.*Load CLIP Vision"):
        net.encode(torch.zeros(1, 3, 224, 224))
    assert predict(net, torch.randn(1, 257, 24, generator=torch.Generator().manual_seed(0))).up.any()


@pytest.fixture
def path(net, tmp_path):
    hypernet_file.save(net, tmp_path / "net.safetensors", {"people": "5000"}, torch.float32)
    return tmp_path / "net.safetensors"


def test_file_round_trip(net, path):
    header = hypernet_file.read_header(path)
    assert header.config == net.config and header.info == {"people": "5000"}
    loaded = hypernet_file.load(path)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    images = photos(2)
    assert torch.equal(predict(loaded, tokens_of(loaded, images)).up, predict(net, tokens_of(net, images)).up)


def test_half_precision_is_close(net, path, tmp_path):
    size = hypernet_file.save(net, tmp_path / "half.safetensors", {})
    assert size < 0.6 * path.stat().st_size
    images = photos(1)
    half, full = (predict(n, tokens_of(n, images)).up for n in (hypernet_file.load(tmp_path / "half.safetensors"), net))
    assert (half - full).norm() < 5e-3 * full.norm()


def test_refuses_damage(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(HyperNetFileError, match="incomplete"):
        hypernet_file.load(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(HyperNetFileError, match="checksum"):
        hypernet_file.load(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda fields: fields.update(format_version=9), "version 9.*Update"),
        (lambda fields: fields["basis"].update(seed=7), "another basis"),
        (lambda fields: fields["basis_probe"].__setitem__(0, 0.5), "another basis"),
        (lambda fields: fields["sizes"].update(rank=2**40), "rank is not between"),
        (lambda fields: fields["sizes"].update(width=2**40), "Expected a decoder that takes at most"),
        (lambda fields: fields["sizes"].update(depth="two"), "garbles a field"),
        (lambda fields: fields["sizes"]["encoder"].update(heads=5), "heads divide"),
        (lambda fields: fields["sizes"]["encoder"].update(token_width=32), "do not fit its sizes"),
        (lambda fields: fields["sizes"]["encoder"].update(stem=[[16, 1]] * 9), "divides"),
        (lambda fields: fields["sizes"].update(prompt="face " * 401), "prompt"),
        (lambda fields: fields["sizes"].update(colour="red"), "garbles a field"),
        (lambda fields: fields["sizes"]["encoder"].update(kind="resnet"), "kind vit or clip_vision"),
    ],
)
def test_refuses_other_headers(path, edit, message):
    rewrite(path, edit)
    with pytest.raises(HyperNetFileError, match=message):
        hypernet_file.load(path)


def test_refuses_other_files(path, make_lidb, tmp_path):
    lidb_file.save(make_lidb(), tmp_path / "person.safetensors")
    with pytest.raises(HyperNetFileError, match="not a HyperNet"):
        hypernet_file.load(tmp_path / "person.safetensors")
    (tmp_path / "page.safetensors").write_text("<html>")
    with pytest.raises(HyperNetFileError, match="not in the safetensors format"):
        hypernet_file.read_header(tmp_path / "page.safetensors")


def test_nothing_is_written_when_it_would_not_be_finite(net, tmp_path):
    net.position.data[0, 0] = 1e6  # more than float16 holds
    with pytest.raises(HyperNetFileError, match="NaN or infinity"):
        hypernet_file.save(net, tmp_path / "net.safetensors", {})
    assert not list(tmp_path.iterdir())


def test_narrow_layers(toy):
    """A basis wider than the layers: the surplus coordinates of a prediction are zero."""
    recipe = BasisRecipe(0, 100, 50)
    net = HyperNet.create(HyperNetConfig(toy.layout, recipe, ENCODER, 32, 2, 2, code=5))
    person = predict(net, tokens_of(net, photos(1)))
    narrow = [i for i, layer in enumerate(toy.layout.layers) if layer.out_features < 50]
    assert narrow and not any(person.up[i, toy.layout.layers[i].out_features :].any() for i in narrow)


def test_a_face_code_reaches_the_factors_in_a_straight_line(net, tmp_path):
    """At first it changes nothing; then everything that it says is there before the first refinement; files keep it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 4, net.config.encoder.token_width, generator=generator)
    before, size = net(tokens)[1], net.code_mean.shape[0]
    net.set_code(*(torch.randn(shape, generator=generator) for shape in (size, (size, 5))))
    torch.testing.assert_close(net(tokens)[1], before)
    with torch.no_grad():
        net.readout.zero_()
        net.offset.zero_()
        net.direct.normal_(generator=generator)
    straight = [net(tokens * share)[1] for share in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(straight[1], (straight[0] + straight[2]) / 2)
    assert not torch.allclose(straight[0], straight[2])
    torch.testing.assert_close(net(0 * tokens, code=net.code(tokens))[1], straight[2])  # a code that is given is taken
    hypernet_file.save(net, tmp_path / "coded.safetensors", {}, torch.float32)
    torch.testing.assert_close(hypernet_file.load(tmp_path / "coded.safetensors")(tokens)[1], straight[2])


def test_a_file_knows_photos_that_are_unlike_those_of_the_training(net, tmp_path):
    pixels = (
        torch.randn(400, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        * torch.linspace(0.5, 1, 400)[:, None, None, None]
    )
    assert net.unlike(pixels) is None
    net.set_seen(net.look(pixels[:100]))
    assert net.unlike(pixels) is None  # too few to know
    net.set_seen(net.look(pixels[:360]))
    hypernet_file.save(net, tmp_path / "net.safetensors", {}, torch.float32)
    loaded = hypernet_file.load(tmp_path / "net.safetensors")
    assert (loaded.unlike(pixels[360:]) > 1).sum() < 10
    assert (loaded.unlike(pixels[360:].clone().mul(0.2).add(1)) > 1).all()
    torch.testing.assert_close(loaded.unlike(pixels[:5]), net.unlike(pixels[:5]))


def test_photos_that_are_cut_in_an_unknown_way_are_refused(config):
    with pytest.raises(HyperNetError, match="cut by centre or face, got 'oval'"):
        replace(config.encoder, cut="oval")


def test_the_code_of_several_photos_is_their_mean(net):
    count = net.config.encoder.summary
    one, other = torch.randn(2, 1, count, net.config.encoder.token_width)
    both = net.summed(torch.cat([one, other], 1))
    torch.testing.assert_close(both, (net.summed(one) + net.summed(other)) / 2)


@pytest.mark.parametrize("sizes", [{"code": 0}, {"rank": 0}, {"iterations": 0}, {"width": 0}])
def test_sizes_that_make_no_sense(config, sizes):
    with pytest.raises(HyperNetError, match="at least 1"):
        replace(config, **sizes)


def test_a_million_places_are_not_compared_with_each_other():
    """A file of 1 MB could ask for that; it would take hours to predict."""
    with pytest.raises(HyperNetError, match="more than one and at most 65,536 places, got 1024 pixels"):
        replace(ENCODER, image_size=1024, patch_size=1, stem=())


@pytest.mark.parametrize(
    "sizes",
    [
        {"image_size": 256, "stem": (), "depth": 8},  # 65,536 places
        {"image_size": 2048, "stem": ((64, 1), (8, 0), (8, 0), (8, 0))},  # a map of 1 GB
    ],
)
def test_an_encoder_of_few_weights_takes_neither_hours_nor_gigabytes(sizes):
    with pytest.raises(HyperNetError, match=r"3,000,000,000,000 operations a photo.*Make encoder"):
        EncoderConfig(**{"token_width": 8, "patch_size": 1, "depth": 0, "heads": 1, "summary": 0} | sizes)


def test_a_decoder_of_few_weights_does_not_take_hours(config):
    layers = tuple(Layer(f"unet.mid_block.attentions.{i}", 8, 8) for i in range(4096))
    most = replace(config, layout=Layout("sd1", layers), iterations=64)
    with pytest.raises(HyperNetError, match=r"at most 3,000,000,000,000 operations a photo, got .* with 64 "):
        replace(most, depth=64)


def test_the_largest_encoders_of_today_are_possible():
    for image_size, patch_size, token_width, depth, heads in ((518, 14, 1536, 40, 24), (1024, 16, 1024, 24, 16)):
        sizes = {"image_size": image_size, "patch_size": patch_size, "token_width": token_width, "depth": depth}
        assert EncoderConfig(**sizes, heads=heads, stem=(), summary=0).places > 1000
    assert EncoderConfig(image_size=512).places == 1024


def test_the_encoder_is_the_vit_of_transformers():
    """Names of 5 and later, and the same arithmetic; what a file holds depends on no installed version."""
    config = EncoderConfig(image_size=32, token_width=24, patch_size=8, stem=(), summary=0, depth=2, heads=3)
    encoder = PhotoEncoder(config)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    vit = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False).eval()
    vit.load_state_dict(encoder.vit.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(pixels), vit(pixel_values=pixels).last_hidden_state)


def test_a_file_needs_no_transformers(path):
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from hdb_core import load_hypernet\n"
        "print(load_hypernet(sys.argv[1]).encoder is not None)"
    )
    read = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True, cwd=ROOT)
    assert read.stdout.strip() == "True"


def test_weights_of_another_type_do_not_fit_the_checksum(net, tmp_path):
    path = tmp_path / "half.safetensors"
    hypernet_file.save(net, path, {})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"F16"', b'"BF16"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with pytest.raises(HyperNetFileError, match="checksum"):
        hypernet_file.load(path)
