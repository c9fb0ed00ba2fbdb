"""Settings of a fast fine-tune as benchmarks name them: flat, noise levels among them, and what decides a row's key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hdb_core.diffusion import NoiseLevels
from hdb_core.finetuning import FinetuneConfig
from hdb_core.recommended import FROM_PHOTO, FROM_PHOTOS, RECOMMENDED

NOISE = frozenset(field.name for field in fields(NoiseLevels))
# What a person from photos alone is applied with: as recommended for several, and "_guided", as for one.
STRENGTHS, GUIDED = RECOMMENDED[FROM_PHOTOS].strengths, RECOMMENDED[FROM_PHOTO].strengths
# Dimensions of a basis that is complete on every layer of SD 1.x; narrower layers cut it to their size.
COMPLETE = {"down_dim": 1280, "up_dim": 1280}
# Steps and rate chosen on dev people.
LORA = {"steps": 150, "learning_rate": 3e-4, "convolutions": False, "down_rate": 1.0, "weighting": "native",
        "max_timestep": 1.0, "train_text_encoder": True, "prior_weight": 1.0, "basis": COMPLETE}  # fmt: skip


@dataclass(frozen=True)
class NodeConfig(FinetuneConfig):
    """All settings of Fast Finetune and its options: those of the training, and which layers the host gives it."""

    convolutions: bool = True


def types(config: type) -> dict[str, str]:
    """Name → type of every field of a dataclass; of noise levels, their own fields."""
    found = {field.name: str(field.type) for field in fields(config)}
    return found | ({field.name: str(field.type) for field in fields(NoiseLevels)} if "noise" in found else {})


def resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of FinetuneConfig with flat settings in its place; a basis may be a dict of some of its fields."""
    default, own = FinetuneConfig(), dict(settings)
    noise = asdict(default.noise) | {name: own.pop(name) for name in NOISE & own.keys()}
    basis = default.basis.fields() | own.pop("basis", {})
    return {**asdict(default), **own, "noise": noise, "basis": basis}
