"""The demonstration's session on a live server."""

import shutil

from devtools import demo


def test_a_session_learns_once_and_paints_with_and_without_the_person(server):
    shutil.copy(demo.PHOTO, server.input)
    session = demo.Session(server, steps=2, seeds=2, seconds={})
    after = session.pictures("a [v] face", "after")
    assert session.steps == 2
    assert session.saved.parent == server.output / "lidb"
    assert session.saved.is_file()
    learned = session.seconds["finetune"]
    others = [session.pictures("a [v] face", column) for column in ("before", "predicted")]
    assert session.seconds["finetune"] == learned
    assert [picture.size for own in (after, *others) for picture in own] == [(128, 128)] * 6
    for own in others:
        assert all(a.tobytes() != b.tobytes() for a, b in zip(after, own, strict=True))
