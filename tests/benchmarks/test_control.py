"""A person behind a ControlNet: what the silhouette and the pose's score are, on drawings."""

from itertools import pairwise

import numpy as np

from benchmarks.common.subjects import Subject
from benchmarks.control import overlap, prompt_of, rows_of, scores, shape_of, text_of
from miniature.drawing import photo
from miniature.judge import Judge
from miniature.people import SPLITS

SUBJECTS = [Subject(SPLITS["dev"].start + i) for i in range(6)]


def drawn(subject, context=None):
    return photo(subject.person, context or prompt_of(subject).context)[None]


def test_a_drawing_covers_its_own_silhouette_and_no_other():
    own = [overlap(drawn(subject), subject, shape_of(subject))[0] for subject in SUBJECTS]
    others = [overlap(drawn(one), one, shape_of(other))[0] for one, other in pairwise(SUBJECTS)]
    assert min(own) > 0.97 and max(others) < 0.93 and np.mean(others) < 0.85


def test_the_prompt_contradicts_the_photo_and_names_a_wall():
    for subject in SUBJECTS:
        expected = prompt_of(subject).expected
        assert expected["background"].endswith("wall")
        assert all(
            expected[name] != getattr(subject.context, name) for name in ("expression", "clothing", "background")
        )


def test_a_true_picture_has_all_scores():
    found = scores(Judge.load("a"), SUBJECTS[0], drawn(SUBJECTS[0]), shape_of(SUBJECTS[0]))
    assert found["pose"] > 0.97 and abs(found["identity"] - 1) < 1e-6
    assert found["retrieval"] == found["adherence"] == 1


def test_rows_differ_in_what_decides_their_pictures(tmp_path):
    net = tmp_path / "net.safetensors"
    net.write_bytes(b"1")
    rows = rows_of(net)
    assert [row.name for row in rows] == [
        *("base", "base, controlled", "person", "person, controlled", "person, controlled by another"),
    ]
    assert len({str(row.settings(SUBJECTS[0])) for row in rows}) == 5
    assert np.array_equal(rows[-1].shape(SUBJECTS[0]), rows[0].shape(SUBJECTS[1]))
    value = {"value": 0.5, "error": 0.1}
    assert "| base | 50.0 ± 10.0 |" in text_of({"base": {"pose": value}}, 2, 4)
