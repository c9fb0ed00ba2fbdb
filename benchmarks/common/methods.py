"""Ways to make a person's pictures. A method names its rows with all settings that decide their pictures, and runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from hdb_core.finetune import FinetuneConfig
from hdb_core.lidb_file import DEFAULT_RANK
from miniature.prompts import describe

from .bench import Bench
from .cells import Cell
from .dreambooth import DreamBoothConfig, dreambooth
from .reference import Checkpoint
from .studio import Models
from .subjects import CLASS_PROMPT, Subject
from .textual_inversion import TextualInversionConfig, textual_inversion

if TYPE_CHECKING:
    from hdb_core.lidb import LiDB

BYTES_PER_WEIGHT = 2  # float16, as checkpoints are shared


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
    """The pictures of any prompts, one for each of the same seeds."""
    pictures = [bench.studio.pictures(models, text, subject.seed, bench.seeds) for text in texts]
    return Cell(np.stack(pictures), {"prompts": list(texts), **facts})


class Base:
    """The base model, which does not know the person."""

    rows: ClassVar[Mapping[str, Mapping[str, Any]]] = {"base": {}}

    def run(self, bench: Bench, subject: Subject, wanted: Container[str]) -> Iterator[tuple[str, Cell]]:
        yield "base", sampled(bench, bench.studio.base, subject)


class Caption:
    """The base model, told all that words can say of the person."""

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


@dataclass(frozen=True)
class FastFinetuning:
    """FastFinetune, and the same person after Save LiDB and Load LiDB.

    Attributes:
        name: of the row; the second is "<name>_saved".
        settings: fields of FinetuneConfig that are not at their default; a basis as a dict.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def rows(self) -> Mapping[str, Mapping[str, Any]]:
        basis = asdict(FinetuneConfig().basis) | self.settings.get("basis", {})
        resolved = {"finetune": {**asdict(FinetuneConfig()), **self.settings, "basis": basis}}
        return {self.name: resolved, f"{self.name}_saved": {**resolved, "file_rank": DEFAULT_RANK}}

    def run(self, bench: Bench, subject: Subject, wanted: Container[str]) -> Iterator[tuple[str, Cell]]:
        lidb, seconds = self._trained(bench, subject)
        loaded, size = self._through_file(bench, subject, lidb)
        steps = self.settings.get("steps", FinetuneConfig().steps)
        facts = {"steps": steps, "seconds": seconds, "bytes": size,
                 "flops": steps * bench.studio.finetune_step_flops(subject.photo, self.settings)}  # fmt: skip
        for row, person in zip(self.rows, (lidb, loaded), strict=True):
            if row in wanted:
                yield row, sampled(bench, bench.studio.apply(person), subject, **facts)

    def saved_person(self, bench: Bench, subject: Subject) -> LiDB:
        """The person as the file holds it, made now if it is not there."""
        path = self._file(bench, subject)
        if not path.exists():
            self._through_file(bench, subject, self._trained(bench, subject)[0])
        return bench.studio.host.module("hdb_core.lidb_file").load(path)

    def _trained(self, bench: Bench, subject: Subject) -> tuple[LiDB, float]:
        return bench.studio.finetune(subject.photo, **{"seed": subject.seed, **self.settings})

    def _through_file(self, bench: Bench, subject: Subject, lidb: LiDB) -> tuple[LiDB, int]:
        loaded, path = bench.studio.saved(lidb, f"bench{os.getpid()}")
        target = self._file(bench, subject)
        target.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size
        os.replace(path, target)
        return loaded, size

    def _file(self, bench: Bench, subject: Subject) -> Path:
        return bench.cells.path(self.name, self.rows[self.name], subject.seed).with_suffix(".safetensors")


@dataclass(frozen=True)
class Stranger:
    """The LiDB of the next person, judged as this one: what a wrong person scores."""

    of: FastFinetuning

    @property
    def rows(self) -> Mapping[str, Mapping[str, Any]]:
        return {"stranger": self.of.rows[self.of.name]}

    def run(self, bench: Bench, subject: Subject, wanted: Container[str]) -> Iterator[tuple[str, Cell]]:
        lidb = self.of.saved_person(bench, Subject(subject.seed + 1, subject.short))
        yield "stranger", sampled(bench, bench.studio.apply(lidb), subject)


@dataclass(frozen=True)
class Reference:
    """A slow training; a row for each checkpoint of it. Subclasses say what is trained."""

    config: Any  # ReferenceConfig
    name: str
    kind: ClassVar[str]  # of the settings, in a row's key

    @property
    def rows(self) -> Mapping[str, Mapping[str, Any]]:
        # The constant rate makes a checkpoint independent of those after it.
        settings = {k: v for k, v in asdict(self.config).items() if k != "checkpoints"}
        return {f"{self.name}@{steps}": {self.kind: settings, "steps": steps} for steps in self.config.checkpoints}

    def run(self, bench: Bench, subject: Subject, wanted: Container[str]) -> Iterator[tuple[str, Cell]]:
        last = max(i for i, row in enumerate(self.rows, 1) if row in wanted)
        run = self.training(bench, subject, replace(self.config, checkpoints=self.config.checkpoints[:last]))
        # Closed here, not when it is collected: the base must be back whatever happens.
        with closing(run):
            for row, (steps, seconds, flops, parameters) in zip(self.rows, run, strict=False):
                facts = {"steps": steps, "seconds": seconds, "flops": flops, "bytes": parameters * BYTES_PER_WEIGHT}
                if row in wanted:
                    yield row, sampled(bench, bench.studio.base, subject, **facts)

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


def fill(bench: Bench, methods: Sequence[Method], rows: Container[str], subject: Subject,
         report: Callable[[str], None]) -> None:  # fmt: skip
    """Makes the cells of a person that are neither there nor judged yet, of the named rows."""
    for method in methods:
        own = {row: settings for row, settings in method.rows.items() if row in rows}
        wanted = {row for row, made in own.items() if not bench.finished(row, made, subject.seed)}
        start = time.perf_counter()
        for row, cell in method.run(bench, subject, wanted) if wanted else ():
            if row in wanted:
                bench.cells.write(row, own[row], subject.seed, cell)
                report(f"{subject.seed} {row}: {time.perf_counter() - start:.0f} s")
                start = time.perf_counter()
