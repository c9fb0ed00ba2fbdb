"""What the photos of ``example_workflows/input`` show: one person, in a context each."""

from devtools.demo import PERSON_SEED
from miniature.photos import photo_context
from miniature.prompts import evaluation_photo

PERSON, _FIRST = evaluation_photo(PERSON_SEED)
CONTEXTS = {
    "hdb_photo.png": _FIRST,
    "hdb_photo_2.png": photo_context(PERSON_SEED, 12),
    "hdb_photo_3.png": photo_context(PERSON_SEED, 13),
}
