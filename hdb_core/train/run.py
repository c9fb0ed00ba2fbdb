"""The folder of a run: its files, its settings, and the stages that it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open

from ..errors import HyperNetError, require
from ..faces import CUTS
from ..files import hypernet as hypernet_file
from ..files.atomic import sweep, write_text
from ..files.reading import GARBLED, nameable, opened, reason, regular
from .data.photos import PREPARED
from .loop import logged_step
from .settings import Settings, changed, flat

MAX_CONFIG_BYTES = 1 << 20
PATIENCE = 10  # seconds, until another training has seen that everything is computed
STAGES = ("basis", "precompute", "pretrain", "train", "evaluate")
# Settings and sections that cannot change once a stage has begun, because its results depend on them.
FIXED = {
    "basis": ("basis", "prompt", "image_size", "convolutions", "prediction_type", "held_out", "overfit"),
    "precompute": ("image_size", "group", "fit", "prediction_type"),
    "pretrain": ("encoder", "class_prompt", "pretrain.portraits", "held_out", "overfit"),
    "train": (
        *(
            "encoder",
            "net",
            "rank",
            "prompt",
            "basis",
            "convolutions",
            "prediction_type",
            "begin_with",
            "held_out",
            "overfit",
        ),
    ),
}


class Run:
    """A folder with everything of one training.

    Args:
        folder: need not exist yet.
        settings: of the run.

    Attributes:
        shared: folder of people and tokens, perhaps of another run.
        people: folder of latents and fitted people.
        tokens: folder of the tokens of a frozen encoder.
        encoder: what pretrain makes.
        file: what train makes: the hypernetwork.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.shared = Path(settings.precomputed) if settings.precomputed else folder
        self.people, self.tokens = self.shared / "people", self.shared / "tokens"
        self.basis, self.encoder = folder / "basis.safetensors", folder / "encoder.safetensors"
        self.pretrain_state, self.pretrain_log = folder / "pretrain_state.safetensors", folder / "pretrain.csv"
        self.state, self.log, self.samples = folder / "state.safetensors", folder / "log.csv", folder / "samples"
        self.file, self.evaluation = folder / "hypernet.safetensors", folder / "evaluation.json"
        self.basis_shares = folder / "basis.json"

    @classmethod
    def open(cls, folder: Path, values: Mapping[str, Any]) -> Run:
        """A new run, or one that is there already, with some settings by their full names. Nothing is written.

        A new run takes from its photos how they were cut, unless ``encoder.cut`` is among the settings.

        Raises:
            HyperNetError: if config.json or what is said of the photos is damaged, a value makes no sense, or cannot change any more;
                if the folder holds somebody else's files that a run writes over.
        """
        path = folder / "config.json"
        before = Settings()
        if path.exists():
            try:
                before = changed(before, _flattened(_read_json(path)))
            except (OSError, *GARBLED) as error:
                raise HyperNetError(
                    f"{path} cannot be read ({reason(error)}). Mend it, or train in another folder."
                ) from error
            if not before.model or not before.photos:
                raise _foreign(path, "names no model and photos")
        run = cls(folder, changed(before, values))
        if path.exists():
            run._require_same(before)
        elif theirs := [
            own
            for own in (run.evaluation, run.basis_shares, run.pretrain_log, run.log, *run.samples.glob("step_*.png"))
            if own.exists()
        ]:
            raise _foreign(theirs[0], f"is there, but not {path.name}")
        elif run.settings.photos and "encoder.cut" not in values:
            run.settings = changed(run.settings, _prepared(Path(run.settings.photos)))
        if not run.settings.model or not run.settings.photos:
            raise HyperNetError(f"{folder} is a new run. Give it --model and --photos.")
        return run

    def locked(self) -> AbstractContextManager[None]:
        """Keeps other trainings out of the folder, which is made; a killed one does not keep it, and what it left is removed.

        Raises:
            HyperNetError: if another training is in the folder, or it cannot be written.
        """
        return _locked(self.folder, "run.lock", (self.folder, self.samples))

    def computing(self) -> AbstractContextManager[None]:
        """Keeps other trainings from computing people or tokens in the same folder, as `locked` does.

        Raises:
            HyperNetError: if another training does so for more than some seconds, or the folder cannot be written.
        """
        return _locked(self.shared, "precompute.lock", (self.people, self.tokens), PATIENCE)

    def write_settings(self) -> None:
        """Write ``config.json``, with every setting."""
        self.folder.mkdir(parents=True, exist_ok=True)
        nested: dict[str, Any] = {}
        for name, value in flat(self.settings).items():
            section, _, rest = name.rpartition(".")
            (nested.setdefault(section, {}) if section else nested)[rest] = value
        write_text(self.folder / "config.json", json.dumps(nested, indent=2, ensure_ascii=False) + "\n")

    def stages(self) -> list[str]:
        """The stages that these settings take, in order."""
        settings = self.settings
        left_out = {
            "basis": settings.basis.learn_from == 0,
            "pretrain": bool(settings.clip_vision) or settings.pretrain.steps == 0 or self.begins_with_hypernet(),
            "train": settings.train.steps == 0,
            "evaluate": settings.train.steps == 0,
        }
        return [stage for stage in STAGES if not left_out.get(stage)]

    def finished(self, stage: str) -> bool:
        """Whether a stage has nothing left to do; those that take minutes are done again or look themselves."""
        if stage == "pretrain":
            return self.encoder.exists() and logged_step(self.pretrain_log) >= self.settings.pretrain.steps
        return stage == "train" and self.file.exists() and logged_step(self.log) >= self.settings.train.steps

    def require_own_result(self, stage: str) -> None:
        """Check that pretrain or train will not write over a result that it cannot go on from, perhaps somebody else's.

        Raises:
            HyperNetError: if there is one without its state, and the stage is not finished.
        """
        own = {"pretrain": (self.encoder, self.pretrain_state), "train": (self.file, self.state)}
        result, state = own[stage]
        if result.exists() and not state.exists() and not self.finished(stage):
            raise HyperNetError(
                f"{result} is there, but not {state.name} to go on from: the stage {stage} would begin anew and write over it. "
                "Move it elsewhere first; begin_with takes it as a beginning."
            )

    def begins_with_hypernet(self) -> bool:
        """Whether ``begin_with`` is a whole hypernetwork and not an encoder.

        Raises:
            HyperNetError: if it is no safetensors file.
        """
        path = self.settings.begin_with
        if not path:
            return False
        try:
            with safe_open(regular(Path(path)), "pt") as file:
                return hypernet_file.KIND.key in (file.metadata() or {})
        except (OSError, *GARBLED) as error:
            raise HyperNetError(
                f"begin_with cannot be read: {reason(error)} ({path}). Give it the encoder.safetensors or the "
                "hypernet.safetensors of another run."
            ) from error

    def _begun(self, stage: str) -> bool:
        own = {
            "basis": self.basis, "precompute": self.folder / "people", "pretrain": self.pretrain_state, "train": self.state,
        }  # fmt: skip
        return own[stage].exists()

    def _require_same(self, before: Settings) -> None:
        old, new = flat(before), flat(self.settings)
        for stage, names in FIXED.items():
            for name in (n for n in new if n in names or n.partition(".")[0] in names):
                if new[name] != old[name] and self._begun(stage):
                    raise HyperNetError(
                        f"{name} is {old[name]!r} in {self.folder} and cannot become {new[name]!r}: the stage {stage} has "
                        "begun. Leave it as it is, or use another run folder."
                    )


@contextmanager
def _locked(folder: Path, name: str, own: Sequence[Path], patience: float = 0) -> Iterator[None]:
    try:
        nameable(folder).mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / name, timeout=patience)
        lock.acquire()
        sweep(*own)
    except Timeout as error:
        raise HyperNetError(
            f"Another training is running in {folder}. Wait for its end, or use another run folder."
        ) from error
    except (OSError, NotImplementedError) as error:
        raise HyperNetError(f"{folder} cannot be written: {reason(error)}. Use another run folder.") from error
    try:
        yield
    finally:
        lock.release()


def _foreign(path: Path, why: str) -> HyperNetError:
    return HyperNetError(
        f"{path} {why}, so it is not of a run: it may be somebody else's, and the run would write over it. Move it "
        "elsewhere, or use another run folder."
    )


def _prepared(photos: Path) -> dict[str, Any]:
    """The settings that a folder of photos asks for: how `data.prepare` has cut them, if it has made the folder."""
    path = photos / PREPARED
    try:
        cut = _read_json(path)["cut"]
        require(cut in CUTS, "cut", " or ".join(CUTS), cut, HyperNetError)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, HyperNetError, *GARBLED) as error:
        raise HyperNetError(
            f"{path} cannot be read ({reason(error)}). Prepare the photos again, or set encoder.cut."
        ) from error
    return {"encoder.cut": cut}


def _read_json(path: Path) -> Any:
    """The contents of a JSON file that is not absurdly long."""
    with opened(path) as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise ValueError(f"it is longer than {MAX_CONFIG_BYTES:,} bytes")
    return json.loads(data.decode("utf-8-sig"))


def _flattened(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of JSON by their full names."""
    if not isinstance(stored, dict):
        raise TypeError("it holds no settings")
    found: dict[str, Any] = {}
    for name, value in stored.items():
        found |= {f"{name}.{rest}": own for rest, own in value.items()} if isinstance(value, dict) else {name: value}
    return found
