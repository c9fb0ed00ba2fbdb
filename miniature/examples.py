"""The photos of ``example_workflows/input``, ``python -m miniature.examples``: drawn people of the test split.

``hdb_photo`` shows whom the demonstration is about; of each ``hdb_person_N`` an example person is predicted, whom the
workflows load as a saved one. ``hdb_picture`` shows two others. It is transparent where the left one's head is, as the
host's Mask Editor saves a mask. ``hdb_silhouette`` is the control picture of one of the saved people in another pose.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from .drawing import draw, head_mask, photo, silhouette
from .people import SPLITS, Context, Person, sample_person
from .photos import photo_context
from .prompts import evaluation_photo

FOLDER = Path(__file__).parent.parent / "example_workflows" / "input"
FIRST = SPLITS["test"].start
DEMO, ALONE, SEVERAL = FIRST, FIRST + 4, FIRST + 12
SAVED = {f"hdb_person_{number}": FIRST + offset for number, offset in enumerate((7, 14, 10, 13), 1)}
IN_PICTURE = (FIRST + 16, FIRST + 5)
POSED, POSE = "hdb_person_3", Context(shift=(8.0, 5.0), scale=1.06, tilt=7.0)
OTHER_PHOTOS = (16, 18)  # of a person's contexts


def photos() -> Mapping[str, tuple[Person, Context]]:
    """Name → whom a photo shows, and how."""
    shown = {
        name: evaluation_photo(seed) for name, seed in {"hdb_photo": DEMO, "hdb_photo_alone": ALONE, **SAVED}.items()
    }
    person, first = evaluation_photo(SEVERAL)
    contexts = (first, *(photo_context(SEVERAL, index) for index in OTHER_PHOTOS))
    return shown | {f"hdb_photos_{number}": (person, context) for number, context in enumerate(contexts, 1)}


def picture() -> np.ndarray:
    """Two people in the city, uint8 RGBA (128, 256, 4), transparent where the left one's head is."""
    people = [evaluation_photo(seed) for seed in IN_PICTURE]
    alpha = np.full((128, 256), 255, np.uint8)
    alpha[:, :128] -= head_mask(*people[0])
    return np.dstack([draw(people, "city"), alpha])


def control_picture() -> np.ndarray:
    """A saved person's silhouette in a pose that their photo does not have, uint8 (128, 128)."""
    return silhouette(sample_person(SAVED[POSED]), POSE)


def main() -> None:
    for name, shown in photos().items():
        Image.fromarray(photo(*shown)).save(FOLDER / f"{name}.png", optimize=True)
    Image.fromarray(control_picture()).save(FOLDER / "hdb_silhouette.png", optimize=True)
    Image.fromarray(picture()).save(FOLDER / "hdb_picture.png", optimize=True)


if __name__ == "__main__":
    main()
