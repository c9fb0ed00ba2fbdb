"""The demonstration's session on a live server."""

import shutil

from devtools import demo


def test_a_session_learns_once_and_paints_with_and_without_the_person(server):
    shutil.copy(demo.PHOTO, server.input)
    session = demo.Session(server, steps=2, seeds=2, seconds={})
    after = session.pictures("a [v] face", strength=1.0)
    assert session.steps == 2
    assert session.saved.parent == server.output / "lidb"
    assert session.saved.is_file()
    learned = session.seconds["finetune"]
    before = session.pictures("a [v] face", strength=0.0)
    assert session.seconds["finetune"] == learned
    assert [picture.size for picture in (*after, *before)] == [(128, 128)] * 4
    assert all(a.tobytes() != b.tobytes() for a, b in zip(after, before, strict=True))
