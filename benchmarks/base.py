"""Is the base worth editing? Prompted words right, and "a face" as varied as the data, on pictures of the stock KSampler.

``python dev.py bench base`` writes ``base.json``, ``base.md`` and ``base.png`` to ``benchmarks/results/``. Prompts come from
people of the split, whom no training saw. Bars: context words and styles right in 90 %, identity words in 85 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from miniature.captions import background_words, context_words, pair_caption, person_words, prompt
from miniature.judge import ATTRIBUTES, Judge, Readings
from miniature.people import BACKGROUNDS, GEOMETRY, STYLES, Context, Person, sample_context, sample_person
from miniature.scores import variety

from .common import grid
from .common.bench import Bench, chosen_subjects, load_judges, open_bench, parser
from .common.cells import Cell
from .common.files import rounded, write_json, write_text
from .common.report import percent
from .common.studio import SIZE
from .common.subjects import CLASS_PROMPT

BARS = {"context": 0.9, "identity": 0.85, "style": 0.9}
SHOWN_BY = {"hair": ("hair_color", "hair_shape"), "skin": ("skin",), "facial_hair": ("facial_hair",),
            "expression": ("expression",), "clothing": ("clothing", "clothing_color"), "background": ("background",),
            "accessory": ("accessory",)}  # fmt: skip
STYLED_WORDS = ("expression", "clothing", "background")


@dataclass(frozen=True)
class Asked:
    """A prompt and the attributes that its words name."""

    text: str
    expected: Mapping[str, str]


def named(person: Person, context: Context, words: Iterable[str]) -> dict[str, str]:
    """The attributes that words of these kinds (keys of ``SHOWN_BY``) name."""
    values = asdict(person) | asdict(context)
    return {name: values[name] for word in words for name in SHOWN_BY[word]}


def context_prompts(seeds: Iterable[int]) -> list[Asked]:
    """Everything of a plain photo's context named, nothing of the person."""
    contexts = [sample_context(seed, "photo") for seed in seeds]
    spoken = [(c, context_words(c)) for c in contexts]
    return [Asked(prompt(words.values()), named(sample_person(0), c, words)) for c, words in spoken]


def identity_prompts(seeds: Iterable[int]) -> list[Asked]:
    """All nameable of a person, nothing else."""
    people = [sample_person(seed) for seed in seeds]
    return [Asked(prompt((w := person_words(p)).values()), named(p, Context(), w)) for p in people]


def style_prompts(seeds: Iterable[int]) -> list[Asked]:
    """The styles in turn, with an expression, clothes and a background. Colours are not asked for: styles change them."""
    asked = []
    for i, seed in enumerate(seeds):
        context = sample_context(seed, STYLES[1 + i % (len(STYLES) - 1)])
        spoken = context_words(context)
        expected = named(sample_person(0), context, STYLED_WORDS) | {"style": context.style}
        del expected["clothing_color"]
        asked.append(Asked(prompt([spoken[word] for word in STYLED_WORDS], context.style), expected))
    return asked


def pair_prompts(seeds: Iterable[int]) -> list[tuple[Asked, Asked]]:
    """Captions of two people, with what each half names."""
    asked = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        people = [(sample_person(s), sample_context(s, "photo")) for s in (seed, seed + 1)]
        background = str(rng.choice(BACKGROUNDS))
        text = ""
        while not text:  # a tenth of the training captions are empty
            text = pair_caption(people, background, rng)
        sides = text.split(", on the left ")[1].split(", on the right ")
        left, right = (Asked(text, spoken_of(side, *one)) for side, one in zip(sides, people, strict=True))
        asked.append((left, right))
    return asked


def spoken_of(text: str, person: Person, context: Context) -> dict[str, str]:
    """The attributes of one person that a text names."""
    words = person_words(person) | context_words(context)
    return named(person, context, [kind for kind, phrase in words.items() if phrase in text])


class Pictures:
    """The pictures of groups of prompts, made once."""

    def __init__(self, bench: Bench, report_only: bool) -> None:
        self.bench, self.report_only, self.count = bench, report_only, 0

    def of(self, group: str, texts: Sequence[str], seeds: int, width: int = SIZE) -> np.ndarray:
        """uint8 (prompts, seeds, 128, width, 3).

        Raises:
            SystemExit: they are not made yet, and nothing new is to be made.
        """
        settings = {"texts": list(texts), "each": seeds}
        cell = self.bench.cells.read(group, settings, 0)
        if cell is None:
            if self.report_only:
                raise SystemExit(f"The pictures of {group} are not made yet.")
            studio = self.bench.studio
            pictures = [studio.pictures(studio.base, text, i, seeds, width) for i, text in enumerate(texts)]
            cell = Cell(np.stack(pictures), {"prompts": list(texts)})
            self.bench.cells.write(group, settings, 0, cell)
            print(f"{group}: {len(texts)} prompts × {seeds}", flush=True)
        self.count += len(texts) * seeds
        return cell.pictures


def shares_right(readings: Readings, asked: Sequence[Asked]) -> dict[str, float]:
    """Share of pictures that show each attribute as asked, where it was asked for."""
    right: dict[str, list[bool]] = {}
    for name in ATTRIBUTES:
        for value, one in zip(readings.value(name), asked, strict=True):
            if name in one.expected:
                right.setdefault(name, []).append(value == one.expected[name])
    return {name: float(np.mean(values)) for name, values in right.items()}


def read(judge: Judge, pictures: np.ndarray) -> Readings:
    """Readings of (prompts, seeds, 128, 128, 3), seed by seed within each prompt."""
    return judge.read(np.ascontiguousarray(pictures.reshape(-1, SIZE, SIZE, 3)))


def spread(readings: Readings) -> dict[str, float]:
    """Against the data: the largest distance of an attribute's frequencies, and the narrowest factor's width."""
    measured = variety(readings)
    # A caption without a style is one of a plain photo.
    attributes = {name: measured[name] for name in ATTRIBUTES if name != "style"}
    factors = {name: measured[name] for name in measured if name not in ATTRIBUTES}
    return {"distance": max(attributes.values()), "mean_distance": float(np.mean(list(attributes.values()))),
            "narrowest": min(factors.values()), "geometry_width": float(np.mean([factors[g] for g in GEOMETRY])),
            **attributes, **factors}  # fmt: skip


def judged(
    judge: Judge, groups: Mapping[str, tuple[np.ndarray, Sequence[Asked]]], faces: Mapping[str, np.ndarray]
) -> dict:
    """Right words by group and attribute, and the variety of unprompted faces."""
    words = {}
    for group, (pictures, asked) in groups.items():
        repeated = [one for one in asked for _ in range(pictures.shape[1])]
        readings = read(judge, pictures)
        shares = shares_right(readings, repeated)
        words[group] = {**shares, "mean": float(np.mean(list(shares.values())))}
        for style in STYLES[1:] if group == "style" else ():
            rows = np.array([one.expected["style"] == style for one in repeated])
            words[style] = shares_right(readings[rows], [one for one in repeated if one.expected["style"] == style])
            words[style]["mean"] = float(np.mean(list(words[style].values())))
    return {"words": words, "faces": {text: spread(read(judge, pictures)) for text, pictures in faces.items()}}


def text_of(result: Mapping, count: int, bench: Bench) -> str:
    """The Markdown report by the first judge."""
    own = next(iter(result["judges"].values()))
    lines = [f"{count} pictures from the stock KSampler, {asdict(bench.sampling)}.", "",
             "| prompted | right, % | bar, % | word by word, % |", "|---|---:|---:|---|"]  # fmt: skip
    for group, shares in own["words"].items():
        value = shares.get("style", shares["mean"])
        each = ", ".join(f"{name} {percent(share)}" for name, share in shares.items() if name != "mean")
        lines.append(
            f"| {group} | {percent(value)} | {percent(BARS.get(group, BARS['style'] if 'style' in shares else None))} | {each} |"
        )
    lines += ["", "| unprompted | mean distance of frequencies | largest | mean width of geometry | narrowest factor |",
              "|---|---:|---:|---:|---:|"]  # fmt: skip
    keys = ("mean_distance", "distance", "geometry_width", "narrowest")
    lines += [f"| {text} | {' | '.join(f'{s[k]:.2f}' for k in keys)} |" for text, s in own["faces"].items()]
    return "\n".join(lines) + "\n"


def sheet(groups: Mapping[str, tuple[np.ndarray, Sequence[Asked]]], faces: Mapping[str, np.ndarray],
          wide: np.ndarray, scenes: np.ndarray) -> grid.Image.Image:  # fmt: skip
    """A few pictures of everything."""
    lines = [(text, list(pictures[0][:8])) for text, pictures in faces.items()]
    for pictures, asked in groups.values():
        lines += [(asked[i].text, list(pictures[i][:8])) for i in range(min(8, len(asked)))]
    lines += [("two people", [half for pair in row for half in np.split(pair, 2, 1)]) for row in wide[:6, :4]]
    lines.append(("empty scenes", list(scenes[:8, 0])))
    return grid.grid(lines)


def prompted(pictures: Pictures, seeds: Sequence[int], each: int) -> dict[str, tuple[np.ndarray, Sequence[Asked]]]:
    """The pictures of all prompts about one person, by group."""
    asked = {"context": context_prompts(seeds), "identity": identity_prompts(seeds), "style": style_prompts(seeds)}
    return {group: (pictures.of(group, [a.text for a in prompts], each), prompts) for group, prompts in asked.items()}


def main() -> None:
    options = parser(__doc__, people=30, name="base")
    options.add_argument("--faces", type=int, default=96, help='pictures of "a face", and of "a [v] face"')
    args = options.parse_args()
    bench, seeds = open_bench(args), [subject.seed for subject in chosen_subjects(args)]
    pictures, each = Pictures(bench, args.report_only), args.seeds_per_prompt
    groups = prompted(pictures, seeds, each)
    pairs = pair_prompts(seeds[: len(seeds) // 3 or 1])
    wide = pictures.of("pairs", [left.text for left, _ in pairs], each, 2 * SIZE)
    halves = zip(np.split(wide, 2, axis=3), zip(*pairs, strict=True), strict=True)
    faces = {text: pictures.of("faces", [text], args.faces) for text in (CLASS_PROMPT, "a [v] face")}
    scenes = pictures.of("scenes", [f"an empty scene, {background_words(b)}" for b in BACKGROUNDS], 1)
    everything = groups | dict(zip(("left half", "right half"), halves, strict=True))
    judges = load_judges(args.weights)
    result = {
        "pictures": pictures.count,
        "sampling": asdict(bench.sampling),
        "device": bench.device,
        "judges": {name: judged(judge, everything, faces) for name, judge in judges.items()},
    }
    text = text_of(result, pictures.count, bench)
    print(text)
    write_json(args.results / "base.json", rounded(result))
    write_text(args.results / "base.md", text)
    grid.save(sheet(groups, faces, wide, scenes), args.results / "base.png")


if __name__ == "__main__":
    main()
