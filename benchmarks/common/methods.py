"""Ways to make a person's pictures. A method names its rows with all settings that decide their pictures, and runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from hdb_core.files.lidb import COMPACT, DEFAULT_RANK
from hdb_core.prompt import caption
from hdb_core.recommended import AS_LORA, RECOMMENDED, Strengths, made_from
from miniature.captions import photo_words
from miniature.drawing import head_mask
from miniature.prompts import describe

from .bench import Bench
from .cells import Cell
from .dreambooth import DreamBoothConfig, dreambooth
from .reference import Checkpoint
from .settings import STRENGTHS, resolved
from .studio import Made, Models, hash_or_missing, recommended_strengths
from .subjects import CLASS_PROMPT, Subject
from .textual_inversion import TextualInversionConfig, textual_inversion

if TYPE_CHECKING:
    from hdb_core.lidb import LiDB

BYTES_PER_WEIGHT = 2  # float16, as checkpoints are shared
CLASS_PICTURES = DreamBoothConfig().class_pictures
FILE = {"rank": DEFAULT_RANK, "bits": COMPACT}  # as Save LiDB writes it


class Method(Protocol):
    """A way to make a person's pictures, as one or more rows of a table."""

    @property
    def rows(self) -> Mapping[str, Mapping[str, Any]]:
        """Row name → settings that its pictures depend on."""

    def run(self, bench: Bench, subject: Subject, wanted: Container[str]) -> Iterator[tuple[str, Cell]]:
        """The cells of one person, at least those of the wanted rows."""


def sampled(bench: Bench, models: Models, subject: Subject, **facts: Any) -> Cell:
    """The pictures of a subject's prompts, and of the class prompt, by models that know the person."""
    return sampled_texts(bench, models, subject, [*(p.text() for p in subject.prompts), CLASS_PROMPT], **facts)


def sampled_texts(bench: Bench, models: Models, subject: Subject, texts: Sequence[str], **facts: Any) -> Cell:
    """The pictures of any prompts, one for each of the same seeds; seconds of a busy machine are left out of the facts."""
    if is_busy():
        facts.pop("seconds", None)
    pictures = [bench.studio.pictures(models, text, subject.seed, bench.seeds) for text in texts]
    return Cell(np.stack(pictures), {"prompts": list(texts), **facts, "made_on": bench.studio.made_on})


def is_busy() -> bool:
    """Whether more has run here than there are cores, so that seconds say what else did."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1) + 0.5


class Base:
    """The base model, which does not know the person."""

    rows: ClassVar[Mapping[str, Mapping[str, Any]]] = {"base": {}}

    def run(self, bench: Bench, subject: Subject, wanted: Container[str]) -> Iterator[tuple[str, Cell]]:
        yield "base", sampled(bench, bench.studio.base, subject)


class Caption:
    """The base model, prompted with a full description of the person."""

    rows: ClassVar[Mapping[str, Mapping[str, Any]]] = {"caption": {}}

    def run(self, bench: Bench, subject: Subject, wanted: Container[str]) -> Iterator[tuple[str, Cell]]:
        words = describe(subject.person)
        texts = [prompt.text("", words) for prompt in subject.prompts]
        yield "caption", sampled_texts(bench, bench.studio.base, subject, texts)


class RealPictures:
    """The given photo as the answer to every prompt, and true pictures of the person in the prompted contexts."""

    rows: ClassVar[Mapping[str, Mapping[str, Any]]] = {"photo": {}, "render": {}}

    def run(self, bench: Bench, subject: Subject, wanted: Container[str]) -> Iterator[tuple[str, Cell]]:
        texts = {"prompts": [prompt.text() for prompt in subject.prompts]}
        yield "photo", Cell(np.stack([subject.photo] * len(subject.prompts))[:, None], texts)
        yield "render", Cell(subject.renders[:, None], texts)


def applied_rows(name: str, settings: Mapping[str, Any], strengths: Sequence[Strengths]) -> dict[str, dict[str, Any]]:
    """A row for each way to apply a person; the first has the name alone, `AS_LORA` is "<name>_as_lora"."""
    others = ("as_lora" if own == AS_LORA else f"{own.model:g},{own.clip:g},{own.guidance:g}" for own in strengths[1:])
    return {
        row: {**settings, **({} if own == AS_LORA else {"strengths": own._asdict()})}
        for row, own in zip([name, *(f"{name}_{other}" for other in others)], strengths, strict=True)
    }


def applied(bench: Bench, lidb: LiDB, row: Mapping[str, Any]) -> Models:
    """The base with a person, as a row's settings say."""
    return bench.studio.apply(lidb, Strengths(**row["strengths"]) if "strengths" in row else AS_LORA)


@dataclass(frozen=True)
class Predicted:
    """PredictLiDB: a person without training.

    Attributes:
        name: of the row.
        hypernet: the hypernetwork's file.
        photos: how many of the person it sees.
        strengths: that the person is applied with, each a row; see `applied_rows`. None are those that the file recommends.
    """

    name: str
    hypernet: Path
    photos: int = 1
    strengths: tuple[Strengths, ...] = ()

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """All that decides the prediction."""
        return {"hypernet": hash_or_missing(self.hypernet), "photos": self.photos}

    @cached_property
    def recommended(self) -> Strengths:
        """What is recommended for its people, and for those who are trained further."""
        return recommended_strengths(self.hypernet)

    @property
    def rows(self) -> Mapping[str, Mapping[str, Any]]:
        return applied_rows(self.name, self.settings, self.strengths or (self.recommended,))

    def run(self, bench: Bench, subject: Subject, wanted: Container[str]) -> Iterator[tuple[str, Cell]]:
        lidb, seconds, flops = self.made(bench, subject)
        _, path = bench.studio.saved(lidb, f"bench{os.getpid()}")
        facts = {"steps": 0, "seconds": seconds, "bytes": path.stat().st_size, "flops": flops}
        path.unlink()
        for row, settings in self.rows.items():
            if row in wanted:
                yield row, sampled(bench, applied(bench, lidb, settings), subject, **facts)

    def made(self, bench: Bench, subject: Subject) -> Made:
        return bench.studio.predict(self.hypernet, subject.photos(self.photos))

    def person(self, bench: Bench, subject: Subject) -> LiDB:
        return self.made(bench, subject).lidb


@dataclass(frozen=True)
class LearnedBasis:
    """EmptyLiDB: an untrained start in a basis that was learned from people.

    Attributes:
        path: the basis's file.
    """

    path: Path

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """All that decides where a training starts."""
        return {"basis": hash_or_missing(self.path)}

    def made(self, bench: Bench, subject: Subject) -> Made:
        return Made(bench.studio.empty(self.path), 0.0, 0)


@dataclass(frozen=True)
class FastFinetuning:
    """FastFinetune, and the same person after Save LiDB and Load LiDB.

    Attributes:
        name: of the row; the last is "<name>_saved".
        settings: fields of NodeConfig that are not at their default, noise levels by their own names; a basis as a dict.
            Automatic steps end as the node's do.
        start: what it goes on from, which brings its basis; None is a random one.
        described: the photos are captioned with what they show besides the person.
        strengths: that the person is applied with, each a row; see `applied_rows`. None are those of the prediction that it
            starts from, or `STRENGTHS`.
        masked: only the head of the photo is learned.
        photos: how many of the person it learns from.
        class_pictures: a prior_weight counts on pictures of the class, instead of on the base model's own answers.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    start: Predicted | LearnedBasis | None = None
    described: bool = False
    strengths: tuple[Strengths, ...] = ()
    masked: bool = False
    photos: int = 1
    class_pictures: bool = True

    @property
    def config(self) -> dict[str, Any]:
        """Every setting but the captions: `described` says whether there are any. Automatic steps as what ends them."""
        config = resolved(self.settings)
        del config["photo_words"]
        source = made_from(self.photos, isinstance(self.start, Predicted), isinstance(self.start, LearnedBasis))
        automatic = RECOMMENDED[source]
        until = {"enough": automatic.enough, "most": automatic.most_steps}
        return config | {"steps": config["steps"] or (automatic.steps if automatic.enough is None else until)}

    @property
    def rows(self) -> Mapping[str, Mapping[str, Any]]:
        resolved: dict[str, Any] = {"finetune": self.config}
        if self.start is not None:
            resolved["start"] = self.start.settings
        if self.described:
            resolved["described"] = True
        if self.masked:
            resolved["masked"] = True
        if self.photos > 1:
            resolved["photos"] = self.photos
        if self._takes_pictures:
            resolved["class_pictures"] = CLASS_PICTURES
        recommended = self.start.recommended if isinstance(self.start, Predicted) else STRENGTHS
        rows = applied_rows(self.name, resolved, self.strengths or (recommended,))
        return {**rows, f"{self.name}_saved": {**rows[self.name], "file": FILE}}

    @property
    def _takes_pictures(self) -> bool:
        return self.class_pictures and self.config["prior_weight"] > 0

    def run(self, bench: Bench, subject: Subject, wanted: Container[str]) -> Iterator[tuple[str, Cell]]:
        lidb, seconds, flops = self.made(bench, subject)
        loaded, size = self._through_file(bench, subject, lidb)
        facts = {"steps": lidb.about.steps, "seconds": seconds, "bytes": size, "flops": flops}
        for row, settings in self.rows.items():
            if row in wanted:
                person = loaded if "file" in settings else lidb
                yield row, sampled(bench, applied(bench, person, settings), subject, **facts)

    def made(self, bench: Bench, subject: Subject) -> Made:
        """The person, at the cost of the prediction and the training."""
        start = self.start.made(bench, subject) if self.start else None
        inputs: dict[str, Any] = {"lidb": start.lidb} if start else {}
        if self._takes_pictures:
            inputs["class_pictures"] = class_pictures(bench, self.config["class_prompt"], CLASS_PICTURES)
        photos, contexts = subject.photos(self.photos), subject.contexts(self.photos)
        masks = np.stack([head_mask(subject.person, c) for c in contexts]) if self.masked else None
        words = "\n".join(map(photo_words, contexts)) if self.described else ""
        settings = {"seed": subject.seed, "photo_words": words, **self.settings}
        lidb, seconds = bench.studio.finetune(photos, **inputs, masks=masks, **settings)
        step = bench.studio.finetune_step_flops(photos, self.settings, **inputs)
        made = Made(lidb, seconds, lidb.about.steps * step)
        return Made(lidb, made.seconds + start.seconds, made.flops + start.flops) if start else made

    def person(self, bench: Bench, subject: Subject) -> LiDB:
        """The person as the file holds it, made now if it is not there."""
        path = self._file(bench, subject)
        if not path.exists():
            self._through_file(bench, subject, self.made(bench, subject).lidb)
        return bench.studio.host.module("hdb_core.files.lidb").load(path)

    def _through_file(self, bench: Bench, subject: Subject, lidb: LiDB) -> tuple[LiDB, int]:
        loaded, path = bench.studio.saved(lidb, f"bench{os.getpid()}")
        target = self._file(bench, subject)
        target.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size
        os.replace(path, target)
        return loaded, size

    def _file(self, bench: Bench, subject: Subject) -> Path:
        return bench.cells.path(self.name, self.rows[self.name], subject.seed).with_suffix(".safetensors")


class LoRA(FastFinetuning):
    """LoRA-DreamBooth, by FastFinetune in a complete basis and with the class-prior preservation loss.

    Where a basis has as many dimensions as the layer, ``down_aux`` and ``up_aux`` are square and orthogonal, so
    ``up_aux · up · down · down_aux`` is any matrix of the rank: a LoRA without constraint, in turned coordinates. As in
    a LoRA, the up side starts at zero and the down side at random; here its rows are orthonormal. Adam is not
    indifferent to the turn, and the products with the bases are work that a LoRA does not have (little beside the UNet).
    Its bytes are those of the ordinary LoRA file.
    """

    @property
    def rows(self) -> Mapping[str, Mapping[str, Any]]:
        return {self.name: super().rows[self.name]}

    def run(self, bench: Bench, subject: Subject, wanted: Container[str]) -> Iterator[tuple[str, Cell]]:
        lidb, seconds, flops = self.made(bench, subject)
        size = bench.studio.lora_size(lidb, f"bench{os.getpid()}")
        facts = {"steps": lidb.about.steps, "seconds": seconds, "bytes": size, "flops": flops}
        yield self.name, sampled(bench, applied(bench, lidb, self.rows[self.name]), subject, **facts)


@dataclass(frozen=True)
class Stranger:
    """The LiDB of the next person, judged as this one: what a wrong person scores."""

    of: FastFinetuning | Predicted

    @property
    def rows(self) -> Mapping[str, Mapping[str, Any]]:
        return {"stranger": self.of.rows[self.of.name]}

    def run(self, bench: Bench, subject: Subject, wanted: Container[str]) -> Iterator[tuple[str, Cell]]:
        lidb = self.of.person(bench, Subject(subject.seed + 1, subject.short))
        yield "stranger", sampled(bench, applied(bench, lidb, self.rows["stranger"]), subject)


@dataclass(frozen=True)
class Reference:
    """A slow training; a row for each checkpoint of it. Subclasses say what is trained.

    Attributes:
        config: settings.
        name: of the rows, before "@".
        described: the photo is captioned with what it shows besides the person.
    """

    config: Any  # ReferenceConfig
    name: str
    described: bool = False
    kind: ClassVar[str]  # of the settings, in a row's key

    @property
    def rows(self) -> Mapping[str, Mapping[str, Any]]:
        # The constant rate makes a checkpoint independent of those after it.
        settings = {k: v for k, v in asdict(self.config).items() if k != "checkpoints"}
        resolved = {self.kind: settings} | ({"described": True} if self.described else {})
        return {f"{self.name}@{steps}": {**resolved, "steps": steps} for steps in self.config.checkpoints}

    def run(self, bench: Bench, subject: Subject, wanted: Container[str]) -> Iterator[tuple[str, Cell]]:
        own = {settings["steps"]: row for row, settings in self.rows.items() if row in wanted}
        prompt = caption(self.config.prompt, photo_words(subject.context) if self.described else "")
        checkpoints = tuple(steps for steps in self.config.checkpoints if steps <= max(own))
        run = self.training(bench, subject, replace(self.config, prompt=prompt, checkpoints=checkpoints))
        # Closed here, not when it is collected: the base must be back whatever happens.
        with closing(run):
            for steps, seconds, flops, parameters in run:
                facts = {"steps": steps, "seconds": seconds, "flops": flops, "bytes": parameters * BYTES_PER_WEIGHT}
                if steps in own:
                    yield own[steps], sampled(bench, bench.studio.base, subject, **facts)

    def training(self, bench: Bench, subject: Subject, config: Any) -> Generator[Checkpoint]:
        """The checkpoints of one person, each while it is in the base model."""
        raise NotImplementedError


@dataclass(frozen=True)
class DreamBooth(Reference):
    """Full DreamBooth."""

    config: DreamBoothConfig = field(default_factory=DreamBoothConfig)
    name: str = "dreambooth"
    kind: ClassVar[str] = "dreambooth"

    def training(self, bench: Bench, subject: Subject, config: DreamBoothConfig) -> Generator[Checkpoint]:
        prior = class_pictures(bench, config.class_prompt, config.class_pictures)
        return dreambooth(bench.studio, subject.photo, prior, config, subject.seed)


@dataclass(frozen=True)
class TextualInversion(Reference):
    """Textual Inversion."""

    config: TextualInversionConfig = field(default_factory=TextualInversionConfig)
    name: str = "textual_inversion"
    kind: ClassVar[str] = "textual_inversion"

    def training(self, bench: Bench, subject: Subject, config: TextualInversionConfig) -> Generator[Checkpoint]:
        return textual_inversion(bench.studio, subject.photo, config, subject.seed)


def class_pictures(bench: Bench, prompt: str, count: int) -> np.ndarray:
    """What the base makes of a class prompt, once for all people: uint8 (count, 128, 128, 3)."""
    settings = {"prompt": prompt}
    cell = bench.cells.read("class_pictures", settings, count)
    if cell is None:
        pictures = bench.studio.pictures(bench.studio.base, prompt, 0, count)
        cell = Cell(pictures[None], {"prompts": [prompt]})
        bench.cells.write("class_pictures", settings, count, cell)
    return cell.pictures[0]


def chosen_rows(methods: Iterable[Method], names: Sequence[str] | None, left_out: str | tuple[str, ...]) -> list[str]:
    """The named rows and the base; without names all but those that end in ``left_out``.

    "dreambooth" names all its checkpoints.

    Raises:
        SystemExit: there is no such row.
    """
    known = [row for method in methods for row in method.rows]
    if names is None:
        return [row for row in known if not row.endswith(left_out)]
    if unknown := set(names) - set(known) - {row.split("@")[0] for row in known}:
        raise SystemExit(f"No row {', '.join(sorted(unknown))}. Rows: {', '.join(known)}")
    return [row for row in known if row == "base" or row in names or row.split("@")[0] in names]


def fill(bench: Bench, methods: Sequence[Method], rows: Container[str], subject: Subject,
         report: Callable[[str], None]) -> None:  # fmt: skip
    """Makes the cells of a person that are neither there nor judged yet, of the named rows that can be made here."""
    for method in methods:
        own = {row: made for row, made in method.rows.items() if row in rows and not bench.misses_file(made)}
        wanted = {row for row, made in own.items() if not bench.finished(row, made, subject.seed)}
        start = time.perf_counter()
        for row, cell in method.run(bench, subject, wanted) if wanted else ():
            if row in wanted:
                bench.cells.write(row, own[row], subject.seed, cell)
                report(f"{subject.seed} {row}: {time.perf_counter() - start:.0f} s")
                start = time.perf_counter()
