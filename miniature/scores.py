"""Scores of generated pictures, as pure functions of what a judge reads off them.

Identity is the mean, over the items that a picture can show, of ``1 - error / error of a random person``: 0 for a
stranger, 1 for exact factors. A picture that commits to nothing and reads as the average gets 0.25 from each geometry
factor, because it lies nearer to everybody than a stranger does. What the judge itself misreads is measured on a
render of the true person in the prompted context (the ceiling), and ``identity`` is relative to it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from statistics import mean, stdev

import numpy as np

from .drawing import photo
from .judge import ATTRIBUTES, FACTORS, Judge, Readings, true_readings
from .people import GEOMETRY, SPLITS, Context, Person, sample_context, sample_person
from .prompts import EvaluationPrompt

ITEMS = (*GEOMETRY, "skin_rgb", "hair_rgb", "hair_shape", "facial_hair")
CONTEXT_ATTRIBUTES = ("expression", "accessory", "clothing", "clothing_color", "background")
GALLERY_SIZE = 1000


@lru_cache(maxsize=1)
def world() -> Readings:
    """4,000 random people in random photos: the distribution that chance and random errors are taken from."""
    seeds = SPLITS["train"][-4000:]
    return true_readings([(sample_person(seed), sample_context(seed)) for seed in seeds])


def item_errors(readings: Readings, people: Readings) -> np.ndarray:
    """How far N pictures are from M people, item by item: float32 (N, M, 14), unnormalised."""
    factors = np.abs(readings.factors[:, None] - people.factors[None])
    colors = factors[..., len(GEOMETRY) :].reshape(*factors.shape[:2], 2, 3).mean(-1)
    names = [readings.index(name)[:, None] != people.index(name)[None] for name in ("hair_shape", "facial_hair")]
    return np.concatenate([factors[..., : len(GEOMETRY)], colors, np.stack(names, -1)], -1, dtype=np.float32)


@lru_cache(maxsize=1)
def random_errors() -> np.ndarray:
    """The expected error of each item between two random people: float32 (14,)."""
    people = world()
    errors = [item_errors(people[slice(i, i + 400)], people[slice(i + 400, i + 800)]) for i in range(0, 4000, 800)]
    return np.stack([e.mean((0, 1)) for e in errors]).mean(0)


def visible_items(prompts: Sequence[EvaluationPrompt]) -> np.ndarray:
    """Which items a right picture of each prompt shows: bool (N, 14).

    Styles change colours, sunglasses cover the eyes.
    """
    visible = np.ones((len(prompts), len(ITEMS)), bool)
    for row, prompt in zip(visible, prompts, strict=True):
        if "style" in prompt.expected:
            row[[ITEMS.index("skin_rgb"), ITEMS.index("hair_rgb")]] = False
        if prompt.expected.get("accessory") == "sunglasses":
            row[[ITEMS.index("eye_spacing"), ITEMS.index("eye_size")]] = False
    return visible


def identity(readings: Readings, people: Readings, visible: np.ndarray | None = None) -> np.ndarray:
    """How much N pictures are each of M people, 0 a stranger and 1 the truth: float32 (N, M).

    Args:
        readings: of the pictures.
        people: the truth about the people.
        visible: bool (N, 14), all items unless given.
    """
    scores = 1 - item_errors(readings, people) / random_errors()
    shown = np.ones((len(readings), len(ITEMS)), bool) if visible is None else visible
    return np.einsum("nmi,ni->nm", scores, shown / shown.sum(1, keepdims=True)).astype(np.float32)


@cache
def _last_people(split: str) -> Readings:
    return true_readings([(sample_person(seed), Context()) for seed in SPLITS[split][-GALLERY_SIZE:]])


def gallery(person: Person) -> Readings:
    """The person and 999 strangers of the same split (of the test split, for seeds outside all of them), person first."""
    split = next((name for name, seeds in SPLITS.items() if person.seed in seeds), "test")
    strangers, own = _last_people(split), true_readings([(person, Context())])
    rows = [i for i, seed in enumerate(SPLITS[split][-GALLERY_SIZE:]) if seed != person.seed][: GALLERY_SIZE - 1]
    return Readings(np.concatenate([own.names, strangers.names[rows]]),
                    np.concatenate([own.factors, strangers.factors[rows]]))  # fmt: skip


def shown(readings: Readings, expected: Sequence[Mapping[str, str]]) -> list[dict[str, bool]]:
    """For each picture, which of its expected attributes it shows."""
    return [
        {name: ATTRIBUTES[name].index(value) == readings.index(name)[i] for name, value in row.items()}
        for i, row in enumerate(expected)
    ]


@cache
def _frequencies(attribute: str) -> np.ndarray:
    """How often each value of an attribute occurs in the world: float64 (values,)."""
    return np.bincount(world().index(attribute), minlength=len(ATTRIBUTES[attribute])) / len(world())


def leak(readings: Readings, photo_context: Context, prompts: Sequence[EvaluationPrompt]) -> list[float | None]:
    """How much of the photo's unprompted context each picture repeats: 0 as often as chance has it, 1 all of it.

    None for prompts that judge identity: they leave nothing over but the accessory. Bare eyes are no accessory.
    """
    names = [n for n in CONTEXT_ATTRIBUTES if (n, getattr(photo_context, n)) != ("accessory", "bare eyes")]
    scores: list[float | None] = []
    for i, prompt in enumerate(prompts):
        if prompt.judges_identity:
            scores.append(None)
            continue
        excess = room = 0.0
        for name in (n for n in names if n not in prompt.expected):
            value = ATTRIBUTES[name].index(getattr(photo_context, name))
            chance = _frequencies(name)[value]
            excess += (readings.index(name)[i] == value) - chance
            room += 1 - chance
        scores.append(float(excess / room))
    return scores


@dataclass(frozen=True)
class PictureScore:
    """Scores of one generated picture; None where its prompt does not ask.

    Attributes:
        seed: of the person.
        kind: of the prompt.
        identity: uncorrected.
        ceiling: the same of a true render in the prompted context.
        retrieval: the person is the nearest of ``GALLERY_SIZE`` people.
        adherence: everything prompted is shown.
        joint: both.
        leak: share of the photo's unprompted context shown, above chance.
    """

    seed: int
    kind: str
    identity: float | None
    ceiling: float | None
    retrieval: bool | None
    adherence: bool | None
    joint: bool | None
    leak: float | None


def ceilings(judge: Judge, person: Person, prompts: Sequence[EvaluationPrompt]) -> np.ndarray:
    """The identity read off real renders of ``person`` in the prompted contexts: float32 (N,)."""
    readings = judge.read(np.stack([photo(person, prompt.context) for prompt in prompts]))
    return identity(readings, true_readings([(person, Context())]), visible_items(prompts))[:, 0]


def score_pictures(readings: Readings, person: Person, photo_context: Context, prompts: Sequence[EvaluationPrompt],
                   ceiling: Sequence[float] | np.ndarray | None = None) -> list[PictureScore]:  # fmt: skip
    """Scores the pictures of one person.

    Args:
        readings: of N pictures.
        person: whom they should show.
        photo_context: of the photo that was given.
        prompts: N, the prompt of each picture.
        ceiling: N, from ``ceilings``; 1 unless given.

    Raises:
        ValueError: The numbers of pictures, prompts and ceilings differ.
    """
    ceiling = np.ones(len(prompts)) if ceiling is None else ceiling
    if not len(readings) == len(prompts) == len(ceiling):
        raise ValueError(f"got {len(readings)} readings, {len(prompts)} prompts and {len(ceiling)} ceilings")
    likeness = identity(readings, gallery(person), visible_items(prompts))
    right = likeness[:, 0] > likeness[:, 1:].max(1)
    followed = [all(row.values()) for row in shown(readings, [prompt.expected for prompt in prompts])]
    leaks = leak(readings, photo_context, prompts)
    scores = []
    for i, prompt in enumerate(prompts):
        judged = prompt.judges_identity
        scores.append(PictureScore(
            seed=person.seed,
            kind=prompt.kind,
            identity=float(likeness[i, 0]) if judged else None,
            ceiling=float(ceiling[i]) if judged else None,
            retrieval=bool(right[i]) if judged else None,
            adherence=bool(followed[i]) if prompt.expected else None,
            joint=bool(right[i] and followed[i]) if judged else None,
            leak=leaks[i],
        ))  # fmt: skip
    return scores


@dataclass(frozen=True)
class Mean:
    """A mean over people with its standard error (0 for one person)."""

    value: float
    error: float


def mean_over_people(values: Iterable[float]) -> Mean:
    """The mean of one number a person and its standard error."""
    values = list(values)
    return Mean(mean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0)


def summarise(scores: Iterable[PictureScore]) -> dict[str, Mean]:
    """Means over people of each score, where a person's value is the mean over their pictures.

    ``identity`` is relative to the ceiling, ``identity_raw`` is not. Scores that no picture has are left out.
    """
    people: dict[int, list[PictureScore]] = {}
    for score in scores:
        people.setdefault(score.seed, []).append(score)
    columns: dict[str, list[float]] = {}
    for rows in people.values():
        own = {name: [float(v) for row in rows if (v := getattr(row, name)) is not None]
               for name in ("identity", "ceiling", "retrieval", "adherence", "joint", "leak")}  # fmt: skip
        means = {name: mean(values) for name, values in own.items() if values}
        if "identity" in means:
            means["identity_raw"] = means["identity"]
            means["identity"] /= means["ceiling"]
        for name, value in means.items():
            columns.setdefault(name, []).append(value)
    return {name: mean_over_people(values) for name, values in columns.items()}


def _expected_change() -> np.ndarray:
    """Expected share of differing values between two random pictures, attribute by attribute: float64 (10,)."""
    return np.array([1 - (_frequencies(name) ** 2).sum() for name in ATTRIBUTES])


def drift(before: Readings, after: Readings) -> float:
    """How far "a face" moved: 0 the same pictures, 1 as different as unrelated ones.

    Args:
        before: "a face" of the base, N seeds.
        after: of the personalised model, the same N seeds.
    """
    names = (before.names != after.names).mean(0)
    geometry = slice(0, len(GEOMETRY))
    moved = np.abs(before.factors - after.factors)[:, geometry].mean(0) / random_errors()[geometry]
    return float(np.concatenate([names / _expected_change(), moved]).mean())


def pull(before: Readings, after: Readings, person: Person) -> float:
    """How far "a face" moved towards the person: 0 not at all, 1 it has become them. Arguments as for ``drift``."""
    truth = true_readings([(person, Context())])
    return float((identity(after, truth) - identity(before, truth)).mean())


def diversity(readings: Readings, prompts: Sequence[EvaluationPrompt]) -> float:
    """How varied the unprompted context is over seeds, relative to the world: 0 always the same, 1 as varied.

    Args:
        readings: of N pictures of one person.
        prompts: N; pictures with equal prompts differ by their seed. Those that judge identity are left out, since
            they name nearly everything.

    Raises:
        ValueError: No prompt has two pictures.
    """
    groups: dict[EvaluationPrompt, list[int]] = {}
    for i, prompt in enumerate(prompts):
        if not prompt.judges_identity:
            groups.setdefault(prompt, []).append(i)
    change = dict(zip(ATTRIBUTES, _expected_change(), strict=True))
    differing = expected = 0.0
    for prompt, rows in groups.items():
        if len(rows) > 1:
            for name in CONTEXT_ATTRIBUTES:
                if name not in prompt.expected:
                    values = readings.index(name)[rows]
                    differing += (values[:, None] != values[None]).sum() / (len(rows) * (len(rows) - 1))
                    expected += change[name]
    if not expected:
        raise ValueError("diversity needs a bare or one-word prompt with at least two seeds")
    return differing / expected


def variety(readings: Readings) -> dict[str, float]:
    """Whether unprompted pictures are as varied as the world, for each attribute and factor.

    For attributes the total variation distance to the world's frequencies (0 the same, 1 disjoint; n pictures of v
    equally likely values reach about 0.4 * sqrt(v / n) by chance), for factors the ratio of standard deviations.
    """
    distances = {
        name: float(np.abs(np.bincount(readings.index(name), minlength=len(values)) / len(readings)
                           - _frequencies(name)).sum() / 2)
        for name, values in ATTRIBUTES.items()
    }  # fmt: skip
    spread = readings.factors.std(0) / world().factors.std(0)
    return distances | dict(zip(FACTORS, spread.astype(float).tolist(), strict=True))
