"""The world is frozen: results are only comparable while the same seeds give the same people and pictures."""

import hashlib
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from PIL import Image

from miniature.drawing import draw, photo
from miniature.judge import ATTRIBUTES
from miniature.people import GEOMETRY, SPLITS, STYLES, Context, sample_context, sample_person
from miniature.pictures import is_pair, subject, training_picture

THUMBNAILS = {
    "photo": (
        "c9d4e4c4aeb2b34428b23f22b23f22b55038c7c4cfc9d4e4c9d4e4c9d4e46f7474664f3558462f3f3b2bacb6c2c9d4e4"
        "c9d4e4b7604daf4628aa5436b04225b23f22bd8279abb7c9b4c0d1c9d4e48e6e51c08559cb8d5ebe8559828688c9d4e4"
        "858a8aa2513988563f80563f83533c8f4630a55e4c92999ea3abb2b1acafbe855abe8458c5895caf7951989290bec9da"
        "808483ac57398d5e447f533c744d398f5e45a6705690979a959b9b9b8e83cb8e5fa3734dac7851cb8d5fae9486929796"
        "88827cb14629a96b4a84543a9e6445ac5f3fa166528d959a979c9b949999b6835d74563a684f35c28c5f909497939896"
        "978576b23f22ae5335a56848a96041b243269e6c5a88909a93999a949a9b9d8c77c78b5cc08b619f968a8d94999c9e97"
        "968373d8b2a7b2775aa86b4aac6748cc8b7ba07e6888909a7b8aa44a6ab5928891cb8e5fb28a6e7283a4889099a1a297"
        "a66c4eeae6e3b8886faf7658b17a5de7e1dda27b607483a03862c52c52acb5bed5eae4e0bfc3d22d53ad5a77b89a9d96"
    ),
    "pencil sketch": (
        "ece8e0d0ccc5cbc8c1d2cfc8d2cfc8c6c3bcdbd7d0ece8e0ece8e0ece8e0b0ada8b6b3adb4b1acadaba5d1cec7ece8e0"
        "ece8e0bfbcb6cdcac3c6c3bccfccc5d2cfc8c5c2bbd0ccc5d6d2cbe8e5dd9b9993c5c2bbdbd7d0cfcbc4acaaa4ece8e0"
        "8e8b87b1afa8a8a6a09c9a949f9d97b1aea8b5b2ac8a8883a4a19cc6c2bcc5c2bbcdc9c2d1cdc6adaaa49b9893d6d3cb"
        "9d9b95c5c2bba9a7a1a4a29c9c9a94aca9a3a7a49e8684808a8883a09d98ddd9d1b1aea8b9b5afdcd8d0afaca6989591"
        "9d9b96ccc9c2d6d3cba8a6a0c4c1bacdcac3a7a49f86837f83817d7f7d79c2bfb8afaca6a7a49fc3bfb886847f96938f"
        "8f8c88d2cfc8cac7c0d4d1c9cdcac2cfccc5a7a49f908e898c8a8584827d94918cdbd7cfcfccc5908d897e7d78898682"
        "9e9b96c1beb7bebcb5d6d3cbc5c3bcbebcb5918f8a8f8d8895938db0ada7a3a09bdcd8d0b8b5af93908c8886818d8b86"
        "d1cec6d8d5cdb5b2acc0bdb6bdbab3d7d5cdbbb8b1a6a49ecdcac3c9c6bfc7c3bddfdcd4c1bdb7c9c6bfa6a39e86837f"
    ),
    "pixel art": (
        "ccccccc6a6a6a03a3a993333993333a34643ccbfbfcccccccccccccccccc79796a73592d6050264d4623afafb3cccccc"
        "ccccccad5656993d33995333993633993333b97979acacc0b9b9c0cccccc907650c3905dcc9666bc8c6386867dcccccc"
        "839099994d3a8053337c5633805033864033995a568c96a9a9acb0b3a9a9bf8c60bf8c60c69060b38353969389c3c3cc"
        "808696a35333896033805033704a33895933a669598693a69696a69c9089cc9966a07a56ac8056cc9966ada38c8d99a6"
        "86808ca03d339966337d5330906333995933995d608693a6a099a699999cb68960796036735630c696668993a39396a6"
        "998983993333a34d33996633a05d33993a339966668390a69696a69396a6a3907dcc9966c39666969690869ca696a3a6"
        "93837ddfb6b3a9734d9966339c633ac98c869d7c767d90a6808cad4a70b9938990cc9966b38c737383ac8696a69c9da6"
        "96663df2f2efb08660a67346a67350f2ece99c73567080a93666c93350b3bcbcd9efefe9c6c9d63353b3537dbc96a3a6"
    ),
    "night": (
        "5269be50579a4925364923324923324a2b415162af5269be5269be5269be2e3c6d2a2b4025263b1b2139465ba55269be"
        "5269be4b3351482637462d404825344923324d4371465baa4a60b05269be3a39544e445a52485e4d445a35457c5269be"
        "37467d422c42382e47352e47362d453b273c4432503c4e8c43569a4956974d445a4d435950465c483e543e4a824e64b7"
        "354378462f423a324a342d45302a433a324b443a573c4d893e4e8940487753485e423b51463e5453485e474b7a3c4c85"
        "38437349273745384f362d4340354b4732474236553b4c893e4f893d4d884a435c302e432b2b404f475e3b4b863d4c85"
        "3e446e492332472d3f43374e45334849253541385a384a883d4d893d4d8941486f51475c4e4760414c7d3a4b88405086"
        "3e436c585992493d5a45384f46364e534772424065384a883346901f389c3c468253485e4946692f4390384988425186"
        "4439526071bd4b4569473d59483f5d5e6fb9433f5e30438d1834a7132c954a5fb35f71bb4e61b1132d97253d9e404f86"
    ),
    "painting": (
        "c3d3e9c8aab0d43710d3320ad5340cd14321c6c3d3c2d2e8c4d4eac3d2e97077766d4e2a5e4625413b26a8b6c6c4d4ea"
        "c4d4eacf553bd13a11ca451bd2360ed4330bcd7b6fa4b4ceadbdd5c4d4ea9a6d43e18b4ae18b49d484477d8385c4d3ea"
        "76828cb44020934e309155358e4c2e9f3f21b751397f8da091a0b3b5acafd98748d58445e18b4acd7d42968d8cb9c8e0"
        "787d7fc64e239d5a369353307f4a2ea35d37aa5f447d8a987e8b999a8779e38d4bba743dc57a41e28b49b48c76889297"
        "897e76d03a11be673896512cb46236c3562aa856427785997c8a998c9599cb834b80562e75512bdd8c4c79808b8b9598"
        "967e6cd3320aca481eb86437c0592dd2380fa55d4976859b7c89988b959896836edd8948d4884d998f8477838f919995"
        "947c6ae4a999c46d43be6739c15d31e080689a6d5d79869a647dac2b5ccb94848ce08b49b681615c77ae7381919ba193"
        "b7663cebe2ddc7805abd6739c27248e8dcd5ad7653647aa31f5ae4154ac7acbadbebe1dab8bfd5164cca3d67c7889297"
    ),
}


def test_splits_are_disjoint():
    seeds = sorted((s.start, s.stop) for s in SPLITS.values())
    assert all(stop <= start for (_, stop), (start, _) in pairwise(seeds))


def test_training_pictures_show_training_people_only_and_nobody_twice():
    seeds = [p.seed for i in [*range(200), 99_998, 99_999, 999_999] for p, _ in subject(i)[0]]
    assert len(set(seeds)) == len(seeds)
    assert all(seed in SPLITS["train"] for seed in seeds)


def test_people_and_contexts_are_pinned():
    seeds = [s for split in SPLITS.values() for s in (*split[:100], *split[-100:])]
    text = "\n".join(f"{sample_person(s)} {sample_context(s)} {sample_context(s, 'photo')}" for s in seeds)
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "2b5e0e8aa520fdb462b5a952963ff2ed907bdf0c3f519fe46a7a03391c41c872"
    )


def test_training_subjects_are_pinned():
    text = "\n".join(str(subject(i)) for i in range(300))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "b934c4145edb88dae56a8896693fd7042e255d8196e74d998bf7b7381ce3b272"
    )


@pytest.mark.parametrize("style", STYLES)
def test_the_look_is_pinned(style):
    """An 8 x 8 thumbnail of two people, within one step: last bits may differ between renderer builds."""
    left, right = ((sample_person(s), sample_context(s, style)) for s in SPLITS["dev"][:2])
    picture = draw([left, (right[0], replace(right[1], clothing="suit"))], "city", style)
    assert picture.shape == (128, 256, 3)
    small = np.asarray(Image.fromarray(picture).resize((16, 8), Image.Resampling.BOX)).astype(int)
    pinned = np.frombuffer(bytes.fromhex(THUMBNAILS[style]), np.uint8).reshape(8, 16, 3)
    assert np.abs(small - pinned).max() <= 1


@pytest.mark.parametrize("factor", GEOMETRY)
def test_every_hidden_factor_is_visible(factor):
    person, context = sample_person(SPLITS["dev"][5]), Context()
    person = replace(person, hair_shape="short", skin_rgb=(255, 224, 198))

    def with_factor(value):
        geometry = tuple(value if name == factor else own for name, own in zip(GEOMETRY, person.geometry, strict=True))
        return photo(replace(person, geometry=geometry), context).astype(int)

    assert (np.abs(with_factor(-0.8) - with_factor(0.8)).max(-1) > 24).sum() >= 20


@pytest.mark.parametrize("attribute", [a for a in ATTRIBUTES if a not in ("hair_color", "skin", "style")])
def test_no_two_values_look_alike(attribute):
    person, context = replace(sample_person(SPLITS["dev"][5]), skin_rgb=(255, 224, 198)), Context()

    def with_value(value):
        change = {attribute: value}
        pair = (
            (replace(person, **change), context) if hasattr(person, attribute) else (person, replace(context, **change))
        )
        return photo(*pair).astype(int)

    for one, other in combinations(map(with_value, ATTRIBUTES[attribute]), 2):
        assert (np.abs(one - other).max(-1) > 24).sum() >= 40


def test_a_person_does_not_depend_on_the_photo():
    person = sample_person(SPLITS["dev"][7])
    assert person == sample_person(SPLITS["dev"][7])
    assert person != sample_person(SPLITS["dev"][8])
    assert (photo(person, Context()) != photo(person, Context(expression="sad"))).any()


def test_training_picture_kinds():
    kinds = [len(subject(i)[0]) for i in range(25)]
    assert kinds.count(2) == 2 and kinds.count(0) == 1 and kinds.count(1) == 22
    assert [i for i in range(25) if is_pair(i)] == [i for i in range(25) if kinds[i] == 2]
    pair, caption = training_picture(8)
    assert pair.shape == (128, 256, 3) and pair.dtype == np.uint8
    assert caption == "" or caption.startswith("two people")
    assert training_picture(24)[0].shape == (128, 128, 3)
