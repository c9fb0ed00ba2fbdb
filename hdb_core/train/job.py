"""A run on its processes and its base model: what the stages share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

from accelerate import Accelerator

from ..basis import BasisRecipe
from ..errors import HyperNetError
from ..files import basis as basis_file
from ..hypernet import EncoderConfig, HyperNetConfig
from .base.model import BaseModel
from .base.vision import VisionEncoder, load_vision_encoder
from .data.faces import Faces, PhotoPixels
from .data.people import EncodedPerson, read_people
from .data.photos import Person, find_people
from .data.tokens import PhotoTokens, precompute_tokens
from .run import Run


class Job:
    """A run on its processes and its base model.

    Args:
        run: folder and settings.
        accelerator: of all processes.
        base: the frozen base model.
    """

    def __init__(self, run: Run, accelerator: Accelerator, base: BaseModel) -> None:
        self.run, self.settings, self.accelerator, self.base = run, run.settings, accelerator, base
        self.share = accelerator.process_index, accelerator.num_processes

    @cached_property
    def everybody(self) -> list[Person]:
        """All people on disk."""
        return find_people(Path(self.settings.photos))

    @property
    def needed(self) -> list[Person]:
        """The people to precompute; with overfit, as many whole groups as that takes, so that others can follow."""
        overfit, group = self.settings.overfit, self.settings.group
        return self.everybody[: -(-overfit // group) * group] if overfit else self.everybody

    @cached_property
    def vision(self) -> VisionEncoder | None:
        """The frozen image encoder, if the run has one."""
        folder = self.settings.clip_vision
        return load_vision_encoder(Path(folder), self.accelerator.device) if folder else None

    @property
    def encoder(self) -> EncoderConfig:
        """The image encoder that the hypernetwork stands behind."""
        own = self.settings.encoder
        return EncoderConfig(**asdict(own)) if self.vision is None else replace(self.vision.config, cut=own.cut)

    @property
    def recipe(self) -> BasisRecipe:
        """The recipe of the bases: of a learned basis, which is read, or of random ones."""
        own = self.settings.basis
        if own.file or self.run.basis.exists():
            return basis_file.load(own.file or self.run.basis)[1]
        return BasisRecipe(own.seed, own.down_dim, own.up_dim)

    @property
    def net_config(self) -> HyperNetConfig:
        """The sizes of the hypernetwork."""
        settings = self.settings
        return HyperNetConfig(
            self.base.denoiser.layout, self.recipe, self.encoder, rank=settings.rank, prompt=settings.prompt,
            iterations=settings.train.max_iterations, by_token=settings.train.class_weight > 0, **asdict(settings.net),
        )  # fmt: skip

    def encoded(self, recipe: BasisRecipe) -> list[EncodedPerson]:
        """Everybody as precompute has kept them.

        Raises:
            HyperNetError: if someone is missing, or as `read_people` does.
        """
        found = list(read_people(self.run.people, self.everybody, recipe, self.base.denoiser.layout))
        if missing := {person.name for person in self.needed} - {own.person.name for own in found}:
            raise HyperNetError(
                f"{self.run.people} lacks {len(missing):,} of {len(self.needed):,} people, such as {min(missing)!r}. Run the "
                "stage precompute, and give all processes one run folder, on a drive that each of them sees."
            )
        return found

    def faces(self, people: Sequence[Person], encoder: EncoderConfig) -> Faces:
        """What the hypernetwork reads of people's photos."""
        if encoder.kind == "clip_vision":
            return PhotoTokens(self.run.tokens, people, encoder)
        return PhotoPixels(encoder, self.settings.train.augment)

    def compute_tokens(self) -> None:
        """Compute the tokens that are missing behind a frozen encoder."""
        if self.vision is not None:
            with self.computing():
                precompute_tokens(self.vision, self.needed, self.run.tokens, self.settings.group, self.share)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Keeps other trainings from computing the same people or tokens while all processes of this one do.

        Raises:
            HyperNetError: as `Run.computing` does.
        """
        with self.run.computing() if self.accelerator.is_main_process else nullcontext():
            self.accelerator.wait_for_everyone()
            yield
            self.accelerator.wait_for_everyone()
