"""The journal of a sweep: what a crash tore is passed over, and the events around it are read."""

from __future__ import annotations

from pipeline.records.journal import Journal


def test_a_torn_line_hides_no_event_and_is_named(tmp_path, capsys):
    before = Journal(tmp_path)
    before.note("slot built", seconds=1.0)
    with before.path.open("ab") as file:
        file.write(b'{"time": 1.0, "event": "slot lo\xc3')  # in the middle of a letter
    assert [row.event for row in before.news()] == ["slot built"]
    after = Journal(tmp_path)
    after.note("slot lost", why="killed")
    assert [row.event for row in after.news()] == ["slot lost"]
    assert capsys.readouterr().err == ""
    assert [row.event for row in Journal(tmp_path, whole=True).news()] == ["slot built", "slot lost"]
    said = capsys.readouterr().err
    assert str(before.path) in said and "damaged line" in said and said.count("\n") == 1
    assert [row.event for row in before.news()] == ["slot lost"]
