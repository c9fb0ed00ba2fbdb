"""What the photos of ``example_workflows/input`` show: one person, in a context each."""

from benchmarks.common.subjects import Subject
from devtools.demo import PERSON_SEED

_SUBJECT = Subject(PERSON_SEED)
_SHOWN = _SUBJECT.contexts(5)
PERSON = _SUBJECT.person
CONTEXTS = {"hdb_photo.png": _SHOWN[0], "hdb_photo_2.png": _SHOWN[3], "hdb_photo_3.png": _SHOWN[4]}
