"""How far the judges can be trusted: ``python -m benchmarks.judge`` writes ``benchmarks/results/judge.json``.

On people that no training saw: accuracy by attribute and style, on clean renders and behind the VAE; retrieval from a
fresh photo; the floor between strangers; how far a caption can get at most; what perfect pictures of the evaluation
prompts score; and whether the two judges rank pictures alike.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from miniature.drawing import photo
from miniature.judge import ARCHITECTURES, ATTRIBUTES, FACTORS, Judge, Readings, true_readings
from miniature.people import GEOMETRY, SPLITS, STYLES, Context, Person, sample_context, sample_person
from miniature.prompts import evaluation_photo, evaluation_prompts
from miniature.scores import (
    ITEMS,
    gallery,
    identity,
    item_errors,
    random_errors,
    score_pictures,
    summarise,
)
from miniature.training import load_average
from miniature.vae import build_vae, to_tensor

from .common.files import write_json

Subject = tuple[Person, Context]


def fresh_subjects(seeds: range, style: str, salt: int) -> list[Subject]:
    """The people of ``seeds``, each in a context of another seed than their own."""
    return [(sample_person(seed), sample_context(10_000_019 * salt + seed, style)) for seed in seeds]


def render(subjects: list[Subject]) -> np.ndarray:
    """uint8 (N, 128, 128, 3)."""
    return np.stack([photo(person, context) for person, context in subjects])


def load_vae(weights: Path, run: Path) -> Callable[[np.ndarray], np.ndarray] | None:
    """Encodes and decodes uint8 pictures with the shipped VAE, or the one in training; None where there is neither."""
    vae = build_vae()
    if (weights / "miniature_vae.safetensors").exists():
        vae.load_state_dict({k: v.float() for k, v in load_file(weights / "miniature_vae.safetensors").items()})
    elif (run / "state.pt").exists():
        vae.load_state_dict(load_average(run))
    else:
        return None

    @torch.inference_mode()
    def reconstruct(pictures: np.ndarray) -> np.ndarray:
        parts = [vae.decoder(vae.encoder(to_tensor(pictures[i : i + 32]))) for i in range(0, len(pictures), 32)]
        levels = ((torch.cat(parts) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return levels.permute(0, 2, 3, 1).numpy()

    return reconstruct


def color_words(subjects: list[Subject]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What the exact RGB says of the words for hair and skin, which are arbitrary at the border of two names.

    Returns:
        By attribute: bool (N,), whether the word is that of most people of nearly the same RGB, the best any reader
        can do; bool (N,), whether it is that of more than nine in ten of them, so that the word is clear.
    """
    pool = [sample_person(seed) for seed in SPLITS["train"][-20_000:]]
    found = {}
    for word, rgb in (("hair_color", "hair_rgb"), ("skin", "skin_rgb")):
        colors = torch.tensor([getattr(p, rgb) for p in pool], dtype=torch.float32)
        mine = torch.tensor([getattr(p, rgb) for p, _ in subjects], dtype=torch.float32)
        names = list(ATTRIBUTES[word])
        words = np.array([names.index(getattr(p, word)) for p in pool])
        own = true_readings(subjects).index(word)
        nearest = words[torch.cdist(mine, colors).topk(25, largest=False).indices.numpy()]
        votes = (nearest[..., None] == np.arange(len(names))).mean(1)
        found[word] = votes.argmax(1) == own, votes[np.arange(len(own)), own] > 0.9
    return found


def accuracy(readings: Readings, subjects: list[Subject]) -> dict[str, float]:
    """Share of right words for each attribute, and for each factor the error relative to a random person's."""
    truth = true_readings(subjects)
    words = {name: float((readings.index(name) == truth.index(name)).mean()) for name in ATTRIBUTES}
    own = np.abs(readings.factors - truth.factors)
    strangers = np.abs(truth.factors - np.roll(truth.factors, 1, 0))
    errors = (own.mean(0) / strangers.mean(0)).astype(float)
    return words | {f"{name}_error": e for name, e in zip(FACTORS, errors.tolist(), strict=True)}


def retrieval(readings: Readings, subjects: list[Subject], visible: np.ndarray | None = None) -> float:
    """Rank-1 retrieval of each picture's person among 1,000."""
    right = 0
    for i, (person, _) in enumerate(subjects):
        rows = slice(i, i + 1)
        likeness = identity(readings[rows], gallery(person), None if visible is None else visible[rows])[0]
        right += likeness[0] > likeness[1:].max()
    return float(right / len(subjects))


def caption_twins(people: list[Person], rng: np.random.Generator) -> list[Person]:
    """For each person a random one of the same complete caption: the best that words alone can promise."""
    pool = [sample_person(seed) for seed in SPLITS["train"][-30_000:-20_000]]
    twins = []
    for person in people:
        same = [p for p in pool if (p.hair_color, p.skin) == (person.hair_color, person.skin)]
        twin = same[rng.integers(len(same))]
        twins.append(replace(twin, hair_shape=person.hair_shape, facial_hair=person.facial_hair))
    return twins


def blend(person: Person, stranger: Person, share: float) -> Person:
    """A person ``share`` of the way from a stranger to ``person``; names switch half way."""

    def mix(mine: tuple, theirs: tuple) -> np.ndarray:
        return share * np.array(mine, float) + (1 - share) * np.array(theirs, float)

    skin, hair = (tuple(mix(getattr(person, n), getattr(stranger, n)).round().astype(int).tolist())
                  for n in ("skin_rgb", "hair_rgb"))  # fmt: skip
    geometry = tuple(mix(person.geometry, stranger.geometry).tolist())
    return replace(person if share > 0.5 else stranger, skin_rgb=skin, hair_rgb=hair, geometry=geometry)


def ranks(values: np.ndarray) -> np.ndarray:
    """float64 ranks of (N,) values."""
    return np.argsort(np.argsort(values)).astype(float)


def report(judges: dict[str, Judge], seeds: range, reconstruct: Callable[[np.ndarray], np.ndarray] | None) -> dict:
    """Every number, by judge; ``judges`` agree under the key "agreement"."""
    result: dict = {name: {"people": len(seeds)} for name in judges}
    rng = np.random.default_rng(0)
    for style in STYLES:
        subjects = fresh_subjects(seeds if style == "photo" else seeds[: len(seeds) // 2], style, 1)
        pictures = render(subjects)
        for name, judge in judges.items():
            own, readings = result[name], judge.read(pictures)
            own.setdefault("renders", {})[style] = accuracy(readings, subjects)
            own["renders"][style]["retrieval"] = retrieval(readings, subjects[:300])
            if style == "photo":
                own |= plain_photos(readings, subjects)
        if reconstruct and style == "photo":
            decoded = reconstruct(pictures[:300])
            for name, judge in judges.items():
                clean, readings = accuracy(judge.read(pictures[:300]), subjects[:300]), judge.read(decoded)
                own = accuracy(readings, subjects[:300])
                result[name]["vae"] = own | {"retrieval": retrieval(readings, subjects[:300])}
                result[name]["vae_points_lost"] = {n: 100 * (clean[n] - own[n]) for n in ATTRIBUTES}
    people = [sample_person(seed) for seed in seeds[:300]]
    contexts = [replace(c, accessory="bare eyes") for _, c in fresh_subjects(seeds[:300], "photo", 2)]
    twins = render(list(zip(caption_twins(people, rng), contexts, strict=True)))
    shares = rng.random(len(people))
    strangers = [*people[1:], people[0]]
    blends = render([(blend(p, s, share), c)
                     for p, s, share, c in zip(people, strangers, shares, contexts, strict=True)])  # fmt: skip
    truths = [true_readings([(p, Context())]) for p in people]
    blended: dict[str, np.ndarray] = {}
    for name, judge in judges.items():
        readings = judge.read(twins)
        scores = np.array([identity(readings[slice(i, i + 1)], t)[0, 0] for i, t in enumerate(truths)])
        result[name]["caption_twin"] = {
            "identity": float(scores.mean()),
            "error": float(scores.std() / len(scores) ** 0.5),
            "retrieval": retrieval(readings, list(zip(people, contexts, strict=True))),
        }
        readings = judge.read(blends)
        blended[name] = np.array([identity(readings[slice(i, i + 1)], t)[0, 0] for i, t in enumerate(truths)])
        result[name]["blend"] = {
            "rank_correlation_with_truth": float(np.corrcoef(ranks(blended[name]), ranks(shares))[0, 1])
        }
    if len(judges) == 2:
        first, second = blended.values()
        result["agreement"] = {"rank_correlation": float(np.corrcoef(ranks(first), ranks(second))[0, 1]),
                               "pictures": len(first)}  # fmt: skip
    for name, scores in perfect_pictures(judges, seeds[:60]).items():
        result[name]["perfect"] = scores
    return result


def plain_photos(readings: Readings, subjects: list[Subject]) -> dict:
    """What plain photos say beyond accuracy: clear words, open eyes, strangers."""
    truth = true_readings(subjects)
    words = {
        name: {
            "accuracy_of_exact_rgb": float(best.mean()),
            "clear": float(clear.mean()),
            "accuracy_where_clear": float((readings.index(name) == truth.index(name))[clear].mean()),
        }
        for name, (best, clear) in color_words(subjects).items()
    }
    open_eyes = np.array([c.accessory != "sunglasses" for _, c in subjects[:300]])
    seen = [s for s, is_open in zip(subjects[:300], open_eyes, strict=True) if is_open]
    everyone = identity(readings[:300], truth[:300])
    apart = everyone[~np.eye(len(everyone), dtype=bool)]
    mean_face = replace(truth, factors=np.zeros_like(truth.factors))[:300]
    same = item_errors(mean_face, truth[:300]).mean((0, 1)) / random_errors()
    errors = item_errors(readings, truth)[np.arange(len(subjects)), np.arange(len(subjects))].mean(0) / random_errors()
    return {
        "color_words": words,
        "retrieval_open_eyes": retrieval(readings[:300][open_eyes], seen),
        "identity_self": float(np.diag(everyone).mean()),
        "identity_strangers": {"mean": float(apart.mean()), "sd": float(apart.std())},
        "geometry_of_the_average_face": float(1 - same[: len(GEOMETRY)].mean()),
        "item_errors": dict(zip(ITEMS, errors.astype(float).tolist(), strict=True)),
    }


def perfect_pictures(judges: dict[str, Judge], seeds: range) -> dict[str, dict]:
    """What real renders in the prompted contexts score, by kind of prompt: the ceiling of every score."""
    rows: dict[str, list] = {name: [] for name in judges}
    for seed in seeds:
        person, shown = evaluation_photo(seed)
        prompts = evaluation_prompts(person, shown)
        pictures = render([(person, prompt.context) for prompt in prompts])
        for name, judge in judges.items():
            rows[name] += score_pictures(judge.read(pictures), person, shown, prompts)
    kinds = sorted({row.kind for row in next(iter(rows.values()))})
    return {
        name: {
            kind: {k: m.value for k, m in summarise(r for r in scores if kind in ("all", r.kind)).items()}
            for kind in ("all", *kinds)
        }
        for name, scores in rows.items()
    }


def print_table(result: dict) -> None:
    judges = [name for name in ARCHITECTURES if name in result]
    for name in judges:
        own = result[name]
        columns = {**own["renders"], **({"behind the VAE": own["vae"]} if "vae" in own else {})}
        print(f"\nJudge {name}: {own['people']} unseen people\n{'':20}" + "".join(f"{c:>16}" for c in columns))
        for row in (*ATTRIBUTES, *(f"{g}_error" for g in FACTORS), "retrieval"):
            print(f"{row:20}" + "".join(f"{100 * column[row]:15.1f}%" for column in columns.values()))
        for key in ("color_words", "vae_points_lost", "retrieval_open_eyes", "identity_self", "identity_strangers",
                    "geometry_of_the_average_face", "caption_twin", "blend"):  # fmt: skip
            print(f"{key}: {own.get(key)}")
        print("perfect pictures of the prompts:")
        for kind, scores in own["perfect"].items():
            print(f"  {kind:16}" + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    if "agreement" in result:
        print(f"\nagreement of the judges: {result['agreement']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--people", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="offset of the first person in the split")
    parser.add_argument("--judges", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--weights", type=Path, default=Path("weights"))
    parser.add_argument("--vae", type=Path, default=Path(".runs/vae"), help="used where the weights hold no VAE")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/judge.json"))
    args = parser.parse_args()
    seeds = SPLITS[args.split][args.first : args.first + args.people]
    judges = {name: Judge.load(name, args.weights) for name in args.judges}
    result = report(judges, seeds, load_vae(args.weights, args.vae))
    print_table(result)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.results, {"split": args.split, "first": args.first, **result})


if __name__ == "__main__":
    main()
