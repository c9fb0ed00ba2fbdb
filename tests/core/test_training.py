"""Training of the hypernetwork: people on disk, and many people fitted at once."""

from __future__ import annotations

import io
import re
import tarfile
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import ExifTags, Image

from hdb_core.adapters import Adapters
from hdb_core.basis import BasisRecipe
from hdb_core.diffusion import NoiseLevels, draw
from hdb_core.errors import FinetuneError, HyperNetError
from hdb_core.hypernet import EncoderConfig
from hdb_core.layout import Layer, Layout
from hdb_core.lidb import Factors, factors_inner, start_down
from hdb_core.prompt import caption
from hdb_core.train.data.faces import AUGMENTATIONS, PhotoPixels
from hdb_core.train.data.groups import missing_groups
from hdb_core.train.data.latents import EncodedPhotos
from hdb_core.train.data.people import read_people
from hdb_core.train.data.photos import Person, Photo, find_people, read_bytes
from hdb_core.train.fit import FitConfig, Fitter
from hdb_core.train.regression import layer_energy, mean_predictor_loss, regression_loss, squared_distance


@pytest.fixture
def fitter(toy, recipe):
    return Fitter(toy, Adapters(recipe, toy.layout), FitConfig(steps=8, learning_rate=0.05))


def pictures(count, seed):
    return torch.randn(count, 4, 6, 6, generator=torch.Generator().manual_seed(seed))


def encoded(latents, mask=None):
    words = ["smiling", "at the beach"][: len(latents)]
    return EncodedPhotos(latents, words, torch.ones_like(latents[:, :1]) if mask is None else mask)


def fitted(fitter, latents, seed=0):
    return fitter.fit([encoded(photos) for photos in latents], torch.Generator().manual_seed(seed))


def test_people_of_a_batch_do_not_mix(fitter):
    """Another neighbour changes nothing of a person."""
    together = fitted(fitter, [pictures(2, 1), pictures(1, 2)])
    elsewhere = fitted(fitter, [pictures(2, 1), pictures(1, 3)])
    torch.testing.assert_close(together[0], elsewhere[0])
    assert (together[1] - elsewhere[1]).norm() > 0.1 * together[1].norm()


def test_fitting_lowers_the_loss_and_touches_every_layer(toy, recipe):
    losses = []
    fitter = Fitter(toy, Adapters(recipe, toy.layout), FitConfig(steps=60, learning_rate=0.05))
    people = [EncodedPhotos(pictures(1, seed), [""], torch.ones(1, 1, 6, 6)) for seed in range(4)]
    up = fitter.fit(people, torch.Generator().manual_seed(0), lambda _, loss: losses.append(loss))
    assert up.shape == (4, len(toy.layout.layers), recipe.up_dim, 1)
    assert (up.flatten(2).norm(dim=-1) > 0).all()
    assert sum(losses[-15:]) < 0.97 * sum(losses[:15])


def test_fitting_is_repeatable_and_leaves_the_global_generator_alone(fitter):
    before = torch.random.get_rng_state()
    first, again, other = (fitted(fitter, [pictures(1, 1)], seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_two_steps_draw_different_noise(toy):
    generator = torch.Generator().manual_seed(0)
    levels = NoiseLevels(0.1, 0.8).of(toy.sigmas())
    first, second = (draw(levels, pictures(4, 0), torch.ones(4), generator) for _ in range(2))
    assert not torch.equal(first.noise, second.noise) and not torch.equal(first.sigma, second.sigma)
    assert toy.sigmas()[20] <= first.sigma.min() and first.sigma.max() <= toy.sigmas()[159]


def test_every_step_of_a_fit_draws_other_noise(toy, fitter, monkeypatch):
    drawn, add_noise = [], toy.add_noise
    monkeypatch.setattr(toy, "add_noise", lambda latents, noise, s: drawn.append(noise) or add_noise(latents, noise, s))
    fitted(fitter, [pictures(1, 1)])
    assert len(drawn) == fitter.config.steps
    assert all(not torch.equal(one, other) for one, other in pairwise(drawn))


def test_captions():
    assert caption("a [v] face", "smiling") == "a [v] face, smiling"
    assert caption("a [v] face", "") == "a [v] face"


def test_divergence_is_an_error(fitter):
    with pytest.raises(FinetuneError, match="diverged"):
        fitted(fitter, [torch.full((1, 4, 6, 6), torch.nan)])


def test_people_on_disk(tmp_path):
    for name in ("anna/1.png", "anna/2.JPG", "ben.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), "red").save(tmp_path / name, "PNG")
    (tmp_path / "anna" / "1.txt").write_text("smiling, at the beach\n")
    (tmp_path / "readme.md").write_text("not a person")
    anna, ben = find_people(tmp_path)
    assert [(p.path.name, p.words) for p in anna.photos] == [("1.png", "smiling, at the beach"), ("2.JPG", "")]
    assert (ben.name, len(ben.photos)) == ("ben", 1)
    for name in ("dr.ina/1.png", "dr.ira/1.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (40, 30), "red").save(tmp_path / name)
    assert [person.name for person in find_people(tmp_path)] == ["anna", "ben", "dr.ina", "dr.ira"]
    Image.new("RGB", (40, 30), "red").save(tmp_path / "anna.png")
    with pytest.raises(HyperNetError, match="two people named 'anna'"):
        find_people(tmp_path)
    pixels = anna.photos[0].pixels(16)
    assert pixels.shape == (16, 16, 3) and pixels[..., 0].min() > 0.999


def test_shards_hold_what_folders_hold(tmp_path):
    """A tar file with the same names is the same people; a folder may hold both."""
    folder, shards = tmp_path / "folder", tmp_path / "shards"
    for name in ("anna/1.png", "anna/2.png", "dr.ina/1.png", "zoe.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 30), 80).convert("RGB").save(folder / name)
    (folder / "anna" / "2.txt").write_text("smiling, at the café\n", encoding="utf-8")
    Image.linear_gradient("L").resize((40, 30)).save(folder / "anna" / "1.mask.png")
    shards.mkdir()
    with tarfile.open(shards / "shard_0.tar", "w") as file:
        for name in ("anna", "dr.ina"):
            file.add(folder / name, name)
        file.add(folder / "anna" / "1.png", "anna/1.json")  # of others, who keep more there
    with tarfile.open(shards / "shard_1.tar", "w") as file:
        file.add(folder / "zoe.png", "./zoe.png")
    plain, stored = find_people(folder), find_people(shards)
    assert [person.name for person in stored] == ["anna", "dr.ina", "zoe"]
    for one, other in zip(plain, stored, strict=True):
        assert one.name == other.name
        assert [photo.words for photo in one.photos] == [photo.words for photo in other.photos]
        for photo, same in zip(one.photos, other.photos, strict=True):
            assert photo.size() == same.size()
            assert torch.equal(photo.pixels(16), same.pixels(16))
            assert torch.equal(photo.region(4, 4), same.region(4, 4))
    assert stored[0].photos[1].words == "smiling, at the café"
    Image.effect_noise((40, 30), 80).save(shards / "anna.png")
    with pytest.raises(HyperNetError, match="two people named 'anna'"):
        find_people(shards)


def test_shards_that_cannot_be_read(tmp_path):
    (tmp_path / "a.png").write_text("not a picture")
    with tarfile.open(tmp_path / "shard.tar", "w") as file:
        file.add(tmp_path / "a.png", "a.png")
    (tmp_path / "a.png").unlink()
    (person,) = find_people(tmp_path)
    with pytest.raises(HyperNetError, match=r"a\.png in .*shard\.tar cannot be read"):
        person.photos[0].pixels(16)
    with tarfile.open(tmp_path / "small.tar", "w:gz") as file:
        file.add(tmp_path / "shard.tar", "b.png")
    with pytest.raises(HyperNetError, match=r"small\.tar is damaged or compressed"):
        find_people(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_in_a_shard(tmp_path, kind):
    """Photos, words and masks that tar writes as links, because another one is the same file, were left out."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "shard.tar", "w") as file:
        file.add(tmp_path / "a.png", "anna/1.png")
        header = tarfile.TarInfo("anna/2.png")
        header.type, header.linkname = kind, "anna/1.png"
        file.addfile(header)
    with pytest.raises(HyperNetError, match=r"shard.tar .*'anna/2.png' is a link; tar's --hard-dereference -h writes"):
        find_people(tmp_path)


@pytest.mark.parametrize("name", [".", "anna"])
def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch, name):
    (tmp_path / "anna").mkdir()
    listed = Path.iterdir

    def refused(folder):  # permissions do not stop root
        if folder == tmp_path / name:
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", refused)
    message = rf"^{re.escape(str(tmp_path / name))} cannot be read \(Permission denied\). Make it readable"
    with pytest.raises(HyperNetError, match=message):
        find_people(tmp_path)


CLAIMS = {
    "sparse": {"GNU.sparse.size": str(10**13), "GNU.sparse.map": "0,10"},
    "negative": {"size": "-5"},
    "the same file again": {"size": "-1536"},
}


@pytest.mark.parametrize("claims", CLAIMS.values(), ids=CLAIMS)
def test_a_shard_that_claims_more_than_it_holds(tmp_path, claims):
    """To read so much would take all memory; to read the same file again and again, for ever."""
    with tarfile.open(tmp_path / "shard.tar", "w") as file:
        file.addfile(tarfile.TarInfo("0.png"))
        header = tarfile.TarInfo("a.png")
        header.size, header.pax_headers = 10, claims
        file.addfile(header, io.BytesIO(bytes(10)))
    with pytest.raises(HyperNetError, match=r"shard\.tar is damaged .*'a\.png' is not in it as a whole"):
        find_people(tmp_path)


def shard_of(path, **contents):
    with tarfile.open(path, "w") as file:
        for name, data in contents.items():
            header = tarfile.TarInfo(f"{name}/1.png")
            header.size = len(data)
            file.addfile(header, io.BytesIO(data))


COSTLY = {
    "digits": b"1" * 60_000,
    "lines within lines": b"2 " * 6_000 + b"=",
    "many entries": b"".join(b"9 %05d=\n" % number for number in range(10_000)),
}


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("said", COSTLY.values(), ids=COSTLY)
def test_extended_headers_that_cost_much(tmp_path, said, kind):
    """Python's own reader takes seconds for each, and some of them gigabytes."""
    with tarfile.open(tmp_path / "shard.tar", "w") as file:
        header = tarfile.TarInfo("any")
        header.type, header.size = kind, len(said)
        file.addfile(header, io.BytesIO(said))
        file.addfile(tarfile.TarInfo("0.png"))
    began = time.process_time()
    with pytest.raises(HyperNetError, match=r"shard\.tar is damaged .*it has an? .*extended header"):
        find_people(tmp_path)
    assert time.process_time() - began < 1


DAMAGE = {
    "a flipped bit in a header": lambda data: data[:1024] + bytes([data[1024] ^ 1]) + data[1025:],
    "cut before a header": lambda data: data[:1024],
    "cut within a header": lambda data: data[:1100],
    "cut before its end": lambda data: data[:2048],
    "zeros over a header": lambda data: data[:1024] + bytes(512) + data[1536:],
    "two joined": lambda data: data + data,
}


@pytest.mark.parametrize("damaged", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_shard_is_refused(tmp_path, damaged):
    """Whoever came after the damage was missing, and nothing said so."""
    shard = tmp_path / "shard.tar"
    shard_of(shard, anna=b"1234", ben=b"5678")
    assert [person.name for person in find_people(tmp_path)] == ["anna", "ben"]
    shard.write_bytes(damaged(shard.read_bytes()))
    with pytest.raises(HyperNetError, match=r"shard\.tar is damaged"):
        find_people(tmp_path)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w|"])  # to a pipe, as webdataset
def test_shards_in_every_format(tmp_path, form, mode):
    people = ["anna", "Zoë", "山田 太郎", "x" * 120, *(["ä" * 200] if form != tarfile.USTAR_FORMAT else [])]
    shared = {"comment": "made today"} if form == tarfile.PAX_FORMAT else None
    with tarfile.open(tmp_path / "shard.tar", mode, format=form, encoding="utf-8", pax_headers=shared) as file:
        for number, name in enumerate(people):
            folder, header = tarfile.TarInfo(name), tarfile.TarInfo(f"{name}/1.png")
            folder.type, header.size, header.mtime = tarfile.DIRTYPE, 600 + number, 1.5
            file.addfile(folder)
            file.addfile(header, io.BytesIO(bytes([number]) * header.size))
    found = {person.name: read_bytes(person.photos[0].path) for person in find_people(tmp_path)}
    assert found == {name: bytes([number]) * (600 + number) for number, name in enumerate(people)}


def test_captions_that_cannot_be_read(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("smiling".encode("utf-8-sig"))  # as some editors write it
    assert find_people(tmp_path)[0].photos[0].words == "smiling"
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(HyperNetError, match=r"a\.txt cannot be read: it is no text in UTF-8"):
        find_people(tmp_path)
    (tmp_path / "a.txt").write_bytes("smiling".encode("utf-16-le"))
    with pytest.raises(HyperNetError, match=r"a\.txt cannot be read: words with a NUL character.* UTF-8"):
        find_people(tmp_path)
    (tmp_path / "a.txt").write_text(
        "smile " * 20_000
    )  # ComfyUI's text encoder would read it for a minute, at every step
    with pytest.raises(HyperNetError, match=r"a\.txt cannot be read: words of 119,999 characters, where 2,000 are"):
        find_people(tmp_path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt").symlink_to("nowhere")
    with pytest.raises(HyperNetError, match=r"a\.txt cannot be read: No such file"):
        find_people(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells whose memory it is")
def test_latents_of_many_people_stay_on_disk(tmp_path):
    def own_memory():
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

    people = [Person(str(i), (Photo(tmp_path / f"{i}.png"),)) for i in range(64)]
    for group in missing_groups(tmp_path / "people", people, {"fit": None}, 32):
        group.write({"latents": torch.ones(32, 4, 512, 512).half(), "counts": torch.ones(32, dtype=torch.long)})
    before = own_memory()
    everybody = list(read_people(tmp_path / "people", people, BasisRecipe(), Layout("sd1", ())))
    assert float(everybody[40].latents.float().mean()) == 1
    assert own_memory() - before < 64  # MB, of 128 on disk


def test_a_mask_belongs_to_its_photo(tmp_path):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "anna.jpg")
    mask = Image.new("L", (40, 20))
    mask.paste(255, (10, 0, 20, 20))  # the left half of the central square
    mask.save(tmp_path / "anna.mask.png")
    Image.new("RGB", (40, 20), "red").save(tmp_path / "ben.jpg")
    anna, ben = (person.photos[0] for person in find_people(tmp_path))
    region = anna.region(4, 4)
    torch.testing.assert_close(region.mean(), torch.tensor(1.0))
    assert region[..., :1].min() > 1.5 and region[..., 3].max() < 0.1
    assert torch.equal(ben.region(4, 4), torch.ones(1, 4, 4))
    Image.new("L", (40, 20)).save(tmp_path / "anna.mask.png")
    with pytest.raises(HyperNetError, match="marks nothing"):
        anna.region(4, 4)
    Image.new("L", (20, 20), 255).save(tmp_path / "anna.mask.png")
    with pytest.raises(HyperNetError, match="20 × 20, its photo 40 × 20"):
        anna.region(4, 4)
    turned = Image.new("RGB", (20, 40), "red")
    turned.getexif()[ExifTags.Base.Orientation] = 6
    turned.save(tmp_path / "anna.jpg", exif=turned.getexif())
    mask.resize((20, 10)).save(tmp_path / "anna.mask.png")
    assert anna.size() == (40, 20)
    assert anna.region(4, 4)[..., :1].min() > 1.5


def test_a_mask_painted_on_a_transparent_layer(tmp_path):
    """On white, it marked all of the photo."""
    Image.new("RGB", (40, 20), "red").save(tmp_path / "anna.jpg")
    mask = Image.new("RGBA", (40, 20))
    mask.paste("white", (10, 0, 20, 20))
    mask.save(tmp_path / "anna.mask.png")
    region = find_people(tmp_path)[0].photos[0].region(4, 4)
    assert region[..., :1].min() > 1.5 and region[..., 3].max() < 0.1


def test_words_and_masks_however_they_are_written(tmp_path):
    """A mask called otherwise was a photo of the person, and words were left out."""
    for name in ("anna/1.JPG", "anna/2.png", "ben.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 20), "red").save(tmp_path / name)
    for name in ("anna/1.MASK.PNG", "anna/2.Mask.jpg", "ben.mask.webp"):
        Image.new("L", (40, 20), 255).save(tmp_path / name)
    for name in ("anna/1.TXT", "ben.Txt"):
        (tmp_path / name).write_text("smiling")
    with tarfile.open(tmp_path / "shard.tar", "w") as file:
        file.add(tmp_path / "anna", "zoe")
    anna, ben, zoe = find_people(tmp_path)
    for person in (anna, zoe):
        assert [(photo.words, photo.mask is None) for photo in person.photos] == [("smiling", False), ("", False)]
    assert [(photo.words, photo.mask.name) for photo in ben.photos] == [("smiling", "ben.mask.webp")]


@pytest.mark.parametrize("where", ["a folder", "a single photo", "a shard"])
@pytest.mark.parametrize("names", [("1.TXT", "1.txt"), ("1.Mask.png", "1.mask.png"), ("1.mask.jpg", "1.mask.png")])
def test_two_texts_or_masks_of_a_photo_are_refused(tmp_path, where, names):
    """One of them was left out, and nothing said so."""
    folder = tmp_path / "anna"
    folder.mkdir()
    Image.new("RGB", (40, 20), "red").save(folder / "1.jpg")
    for name in ("2.txt", "2.TXT"):  # of no photo
        (folder / name).touch()
    if where == "a shard":
        (tmp_path / "shards").mkdir()
    assert len(find_people(folder)) == 1
    for name in names:
        (folder / name).write_text("smiling")
    if len(list(folder.iterdir())) < 5:
        pytest.skip("names differ by more than capitals on this disk")
    if where == "a shard":
        with tarfile.open(tmp_path / "shards" / "shard.tar", "w") as file:
            file.add(folder, "anna")
    place = {"a folder": tmp_path, "a single photo": folder, "a shard": tmp_path / "shards"}[where]
    with pytest.raises(HyperNetError, match=rf"{names[0]}.* and .*{names[1]}.* belong to the same photo"):
        find_people(place)


def test_a_mask_counts_in_a_fit(fitter):
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., :3] = 2
    whole, masked = (
        fitter.fit([encoded(pictures(1, 1), own)], torch.Generator().manual_seed(0))
        for own in (torch.ones_like(mask), mask)
    )
    assert (masked - whole).norm() > 0.1 * whole.norm()


def test_augmented_photos_depend_on_their_seed_alone(tmp_path):
    Image.effect_noise((40, 30), 80).convert("RGB").save(tmp_path / "anna.png")
    Image.effect_noise((40, 30), 80).convert("RGB").save(tmp_path / "ben.png")
    anna, ben = ((person, 0) for person in find_people(tmp_path))
    encoder = EncoderConfig(image_size=32)
    plain = PhotoPixels(encoder).read([anna])
    before = torch.random.get_rng_state()
    for kind in AUGMENTATIONS:
        faces = PhotoPixels(encoder, [kind])
        assert torch.equal(faces.read([anna]), plain)
        changed = torch.cat([faces.read([anna], [seed]) for seed in range(6)])
        assert (changed - plain).flatten(1).norm(dim=1).max() > 0.1 * plain.norm()
        assert torch.equal(faces.read([ben, anna], [7, 4])[1], changed[4])
    assert torch.equal(before, torch.random.get_rng_state())


def test_no_people_on_disk(tmp_path):
    with pytest.raises(HyperNetError, match="no folder"):
        find_people(tmp_path / "missing")
    with pytest.raises(HyperNetError, match="no photos"):
        find_people(tmp_path)
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(HyperNetError, match="cannot be read"):
        find_people(tmp_path)[0].photos[0].pixels(16)


def factors(seed, rank=1, people=5, layers=3):
    generator = torch.Generator().manual_seed(seed)
    shapes = (people, layers, rank, 12), (people, layers, 8, rank)
    return Factors(*(torch.randn(shape, generator=generator) for shape in shapes))


def dense(people):
    return people.up @ people.down


def test_distances_equal_those_of_the_matrices():
    one, other = factors(1, rank=1), factors(2, rank=3)
    torch.testing.assert_close(factors_inner(one, other), (dense(one) * dense(other)).sum((-2, -1)))
    torch.testing.assert_close(squared_distance(one, other), (dense(one) - dense(other)).square().sum((-2, -1)))


def test_the_gauge_of_the_factors_does_not_count():
    target = factors(1)
    turned = Factors(-3 * target.down, target.up / -3)
    assert regression_loss(turned, target, layer_energy(target)) < 1e-5


def test_on_the_shared_down_side_distances_are_those_of_the_factors():
    """What a loss on raw factors gets wrong is only what the down side is free to do."""
    layout = Layout("sd1", tuple(Layer(f"diffusion_model.{n}", 12, 8) for n in range(3)))
    down = start_down(BasisRecipe(down_dim=12, up_dim=8), layout, 2).expand(5, -1, -1, -1)
    one, other = (Factors(down, factors(seed, rank=2).up) for seed in (1, 2))
    torch.testing.assert_close(squared_distance(one, other), (one.up - other.up).square().sum((-2, -1)))


def test_predicting_zero_costs_one_and_the_mean_is_the_best_constant():
    target = factors(1, people=40)
    energy = layer_energy(target)
    zero = Factors(target.down, torch.zeros_like(target.up))
    torch.testing.assert_close(regression_loss(zero, target, energy), torch.tensor(1.0))
    mean = dense(target).mean(0)
    expected = ((dense(target) - mean).square().sum((-2, -1)) / energy).mean()
    torch.testing.assert_close(mean_predictor_loss(target, energy), expected)


def test_a_layer_without_changes_is_left_out():
    target = factors(1)
    target.up[:, 0] = 0
    loss = regression_loss(factors(2), target, layer_energy(target))
    assert loss.isfinite() and mean_predictor_loss(target, layer_energy(target)).isfinite()
