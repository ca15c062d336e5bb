"""The journal of a sweep: what a crash tore is passed over, and the events around it are read."""

from __future__ import annotations

import math
import time

from pipeline.records.journal import Journal, sentence


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


def test_each_event_is_read_once_with_its_facts(tmp_path):
    writer, reader = Journal(tmp_path), Journal(tmp_path)
    assert reader.news() == [] and writer.path == tmp_path / "journal.jsonl"
    for number in range(3):
        before = time.time()
        writer.note("slot built", seconds=number, why="a reason", whole=True)
        (event,) = reader.news()
        assert before - 0.001 <= event.time <= time.time() + 0.001 and round(event.time, 3) == event.time
        assert event.facts == {"seconds": number, "why": "a reason", "whole": True}
        assert event.number("seconds") == number and math.isnan(event.number("why")) and math.isnan(event.number("x"))
        assert reader.news() == []
    assert len(writer.path.read_bytes().split(b"\n")) == 4, "whole lines are not parted by empty ones"


def test_a_blank_line_and_a_line_that_is_still_written_are_no_damage(tmp_path, capsys):
    journal = Journal(tmp_path)
    journal.note("first")
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + b"  \n" + whole[:-5])
    assert [event.event for event in journal.news()] == ["first"]
    journal.path.write_bytes(whole + b"  \n" + whole)
    assert [event.event for event in journal.news()] == ["first"]
    assert capsys.readouterr().err == ""


def test_a_damaged_line_is_shown_by_its_first_forty_characters(tmp_path, capsys):
    journal = Journal(tmp_path)
    journal.path.write_bytes(b"x" * 50 + b"\n")
    assert journal.news() == []
    assert f"{journal.path} has a damaged line, which is passed over: '{'x' * 40}' (" in capsys.readouterr().err


def test_a_sentence_has_the_beginning_of_what_is_long():
    assert sentence("slot lost", {"seconds": 1.5, "why": "killed"}) == "slot lost: seconds 1.5, why killed"
    more = " (all of it in runs/journal.jsonl)"
    assert sentence("slot lost", {"why": "one\ntwo", "by": "x" * 201}) == f"slot lost: why one, by {'x' * 200}{more}"
    assert sentence("slot lost", {"by": "x" * 200}) == f"slot lost: by {'x' * 200}"
