"""Who is trained on, and who is kept for the evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ..errors import HyperNetError
from .data.people import EncodedPerson

Someone = TypeVar("Someone")


def split(people: Sequence[Someone], share: float, overfit: int = 0) -> tuple[list[Someone], list[Someone]]:
    """The people to train on, and the last ones, who are kept from it.

    Args:
        people: everybody.
        share: of them to be kept; at least one is.
        overfit: a check: the first so many are both; 0 is none.

    Raises:
        HyperNetError: if no one would be left to train on.
    """
    if overfit:
        first = list(people[:overfit])
        return first, first
    count = max(1, round(share * len(people)))
    if count >= len(people):
        raise HyperNetError(
            f"{len(people)} people are too few: at least two are needed, one of them kept from training. Add people to "
            "the folder of photos, or lower held_out."
        )
    return list(people[:-count]), list(people[-count:])


def learned_from(people: Sequence[EncodedPerson], overfit: int = 0) -> dict[str, Any]:
    """What two trainings on people must share for one to go on in the other; a check goes on in no training."""
    masks = sum(photo.mask is not None for own in people for photo in own.person.photos)
    check = {"overfit": overfit} if overfit else {}
    return {"set of people": trained_on(people), "number of masks": masks, **check}


def trained_on(people: Sequence[EncodedPerson]) -> str:
    """How many people are learned from, and a checksum of their names and numbers of photos."""
    who = [(own.person.name, len(own.person.photos)) for own in people]
    return f"{len(people)} {hashlib.sha256(json.dumps(who).encode()).hexdigest()[:16]}"


def require_unseen(everybody: Sequence[EncodedPerson], judged: int, info: Mapping[str, str]) -> None:
    """Check that a hypernetwork was trained on the first of some people, and not on the last ones, who are judged.

    Raises:
        HyperNetError: if it was trained on others, or on some of those, or does not say on whom.
    """
    who = info.get("trained_on", "")
    try:
        count = int(who.partition(" ")[0])
    except ValueError:
        raise HyperNetError(
            "The hypernetwork does not say whom it was trained on. Train it anew with hdb_core.train to evaluate it."
        ) from None
    if count > len(everybody) - judged or trained_on(everybody[:count]) != who:
        raise HyperNetError(
            f"The hypernetwork may have been trained on some of the last {judged} of these {len(everybody)} people. Give "
            "--photos as it was in train, and no larger held_out."
        )
