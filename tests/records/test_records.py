"""Every record: files of before there were schema numbers, to the disk and back, and whatever else a file may hold."""

import errno
import json
import math
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.core.errors import InputError
from pipeline.records import Record, Unreadable, Unseen, as_written, say_once
from pipeline.records.evaluation import Evaluation, Evaluations, Measurement, StudyFile
from pipeline.records.journal import JournalEvent
from pipeline.records.store import TrialFolder, check_adapter
from pipeline.records.trial import CheckpointState, EpochReport, Provenance, StepLosses, TrialEnd, TrialRecord

OLD = Path(__file__).parents[1] / "golden/records"  # as version 1.2 wrote them
KEY = "c850f8e56511b660"
MODELS: dict[type[Record], list[str]] = {
    TrialRecord: [f"runs/{KEY}/config.json"],
    TrialEnd: [f"runs/{name}/done.json" for name in (KEY, "0000000000stopped", "00000000000failed")],
    EpochReport: [f"runs/{KEY}/metrics.jsonl"],
    StepLosses: [f"runs/{KEY}/losses.jsonl"],
    CheckpointState: [f"runs/{KEY}/checkpoint/epoch-0005/state.json"],
    JournalEvent: ["runs/journal.jsonl"],
    Evaluation: ["evaluations/12eeadb14a0de6c0.json"],
    Measurement: ["evaluations/measures/0123456789abcdef.json"],
    StudyFile: ["evaluations/studies/miniature-points.json"],
}
TEXTS = [
    (model, text)
    for model, names in MODELS.items()
    for name in names
    for text in ((OLD / name).read_text().splitlines() if name.endswith("l") else [(OLD / name).read_text()])
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def parsed(model: type[Record], text: str) -> Record:
    return model.parse(text, "some/file.json", "Do this")


@pytest.mark.parametrize(("model", "text"), TEXTS)
def test_a_file_of_before_is_read_and_nothing_of_it_is_lost(model, text):
    before, after = json.loads(text), json.loads(parsed(model, text).text(None))
    assert after.pop("schema") == model.schema_number
    before.pop("schema", None)
    for cell in before.get("cells", []):
        assert cell.pop("evaluate_seconds") > 0  # nothing read it, and the evaluation has it
    assert lacking(before, after) == []


def lacking(before, after, at=""):
    """Return what `before` says and `after` does not."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [row for name in before for row in lacking(before[name], after.get(name), f"{at}.{name}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [row for number, pair in enumerate(zip(before, after)) for row in lacking(*pair, f"{at}.{number}")]
    return [] if before == after else [f"{at}: {before!r} became {after!r}"]


@pytest.mark.parametrize(("model", "text"), TEXTS)
def test_what_is_written_is_read_as_the_same(model, text):
    record = parsed(model, text)
    assert parsed(model, record.text()) == record and parsed(model, record.text()).text() == record.text()


@pytest.mark.parametrize("model", MODELS)
def test_a_record_that_was_read_does_not_change(model):
    record = next(parsed(kind, text) for kind, text in TEXTS if kind is model)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(record, next(iter(model.model_fields)), None)


def test_a_store_of_before_opens():
    folder = TrialFolder(OLD / "runs" / KEY)
    assert folder.config().key == KEY and folder.record().provenance.machine.cores == 2
    end = folder.end()
    assert end is not None and end.final and end.chosen_epoch == 4 and end.objective == 6.482210099483836
    assert [report.epoch for report in folder.epochs()] == list(folder.losses()) == [1, 2, 3, 4, 5]
    assert folder.epochs()[3].objective == end.objective and folder.losses()[1] == (16.6124, 15.40322, 16.05907)
    evaluations = Evaluations(OLD / "evaluations")
    assert evaluations.studies() == ["miniature-points"]
    (cell,) = evaluations.study("miniature-points").cells
    evaluation = evaluations.read(str(cell.evaluation))
    assert evaluation.value == cell.value == 86.41 and [p.score for p in evaluation.predictions]
    measurement = evaluations.find_measurement("0123456789abcdef")
    assert measurement is not None and measurement.numbers["milliseconds_per_sample"] == 4.51
    assert evaluations.find("gone") is evaluations.find("../../etc") is evaluations.find(None) is None
    assert (folder.adapter, folder.checkpoint) == (folder.path / "adapter", folder.path / "checkpoint")


numbers = st.floats(allow_nan=False) | st.none()
reports = st.builds(
    EpochReport, epoch=st.integers(0, 10**6), **{n: numbers for n in EpochReport.model_fields if n != "epoch"}
)
ends = st.builds(
    TrialEnd, status=st.sampled_from(["finished", "diverged", "stopped", "failed"]), error=st.text() | st.none(),
    epochs=st.integers(0) | st.none(), objective=numbers, train_flops=numbers, adapter_digest=st.text() | st.none(),
)  # fmt: skip
events = st.builds(
    lambda time, event, facts: JournalEvent(time=time, event=event, **facts), st.floats(allow_nan=False), st.text(),
    st.dictionaries(st.sampled_from(["why", "pids", "seconds", "attempt"]), JSON, max_size=3),
)  # fmt: skip
states = st.builds(
    CheckpointState, epoch=st.integers(0), rows=st.lists(reports, max_size=3).map(tuple), keeping=st.floats(0, 9),
    files=st.dictionaries(st.text(), st.text(), max_size=3),
)  # fmt: skip
origins = st.builds(
    Provenance, commit=st.text() | st.none(), dirty=st.booleans() | st.none(), diff=st.text(),
    changed=st.lists(st.text()).map(tuple),
)  # fmt: skip
records = st.builds(TrialRecord, config=st.dictionaries(st.text(), JSON, max_size=4), provenance=origins)


@given(st.one_of(reports, ends, events, states, records))
def test_any_record_comes_back_from_the_disk(record):
    again = parsed(type(record), record.text())
    assert again.text() == record.text()  # as text, in which no number equals itself
    assert json.loads(record.text())["schema"] == record.schema_number


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_whatever_a_file_holds_gives_the_record_or_one_line(data):
    model, text = data.draw(st.sampled_from(TEXTS))
    changed = data.draw(mutations(json.loads(text)) | JSON)
    try:
        record = parsed(model, json.dumps(changed))
    except InputError as error:
        line = str(error)
        assert line.startswith("some/file.json: ") and "\n" not in line and len(line) < 900
        assert line.endswith(". Do this") or "newer" in line or "unknown field" in line
    else:
        assert parsed(model, record.text()).text() == record.text()


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_torn_or_flipped_give_the_record_or_one_line(data):
    model, text = data.draw(st.sampled_from(TEXTS))
    raw = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    try:
        model.parse(bytes(raw), "some/file.json", "Do this")
    except InputError as error:
        assert str(error).startswith("some/file.json: ") and "\n" not in str(error)


@st.composite
def mutations(draw, tree):
    """Return a tree in which one thing is another, is gone, is there twice, or is added."""
    if not isinstance(tree, dict | list) or not tree or draw(st.integers(0, 5)) == 0:
        return draw(JSON)
    name = draw(st.sampled_from(sorted(tree))) if isinstance(tree, dict) else draw(st.integers(0, len(tree) - 1))
    kind = draw(st.sampled_from(["below", "below", "gone", "new", "schema"]))
    out = tree.copy()
    if kind == "below":
        out[name] = draw(mutations(tree[name]))
    elif kind == "gone":
        del out[name]
    elif isinstance(out, dict):
        out[draw(st.text(max_size=8)) if kind == "new" else "schema"] = draw(JSON)
    else:
        out.append(draw(JSON))
    return out


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("done.json", {"status": "gone"}, r"done.json: status: Input should be 'finished'.*got 'gone'. Remove the"),
        ("done.json", {"objective": "0.5"}, r"objective: Input should be a valid number, got '0.5'"),
        ("done.json", {"epochs": -1}, r"epochs: Input should be greater than or equal to 0, got -1"),
        ("done.json", {"typo": 1}, r"done.json: unknown field 'typo'. Known: adapter_digest,"),
        ("done.json", {"schema": 4}, r"done.json: schema 4 was written by newer code, this code knows 3. Use the code"),
        ("done.json", {"schema": True}, r"done.json: .*no schema has such a number"),
        ("config.json", {"config": {"backbone": 3}}, r"config.json: backbone: Input should be a valid string, got 3"),
        ("config.json", {"provenance": {"schema": 9}}, r"schema 9 was written by newer code"),
    ],
)
def test_an_error_names_file_field_value_and_the_way_out(tmp_path, name, change, said):
    shutil.copytree(OLD / "runs" / KEY, tmp_path / KEY)
    file = tmp_path / KEY / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    folder = TrialFolder(tmp_path / KEY)
    with pytest.raises(InputError, match=said):
        folder.end() if name == "done.json" else folder.config()


def test_a_torn_last_line_is_left_out_and_said_once(tmp_path, capsys):
    say_once.cache_clear()
    folder = TrialFolder(tmp_path)
    folder.write_epochs([EpochReport(epoch=1, objective=1.0), EpochReport(epoch=2)])
    with folder.metrics.open("a") as file:
        file.write('{"epoch": 3, "obj')
    assert [row.epoch for row in folder.epochs()] == [row.epoch for row in folder.epochs()] == [1, 2]
    assert capsys.readouterr().err.count(f"{folder.metrics}:3: the last line was torn by a crash") == 1
    folder.metrics.write_text('{"epoch": 1}\n \n{"epoch": 2}\n')
    assert [row.epoch for row in folder.epochs()] == [1, 2]
    folder.metrics.write_text('{"epoch": 1}\n{"epoch": 2, "obj\n{"epoch": 3}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:2: damaged: .*Remove the trial's folder"):
        folder.epochs()


def test_an_epoch_run_again_replaces_its_first_try(tmp_path):
    folder = TrialFolder(tmp_path)
    folder.write_epochs([EpochReport(epoch=2, objective=1.0), EpochReport(epoch=1), EpochReport(epoch=2, objective=3)])
    assert [(row.epoch, row.objective) for row in folder.epochs()] == [(1, None), (2, 3.0)]
    folder.add_losses(1, [0.123456789, 2.0])
    folder.add_losses(2, [5.0])
    folder.add_losses(2, [math.inf])
    assert folder.losses() == {1: (0.1234568, 2.0), 2: (math.inf,)}


def test_a_report_is_found_among_what_ray_tune_adds():
    fields = {"epoch": 3, "objective": 0.5, "pid": 7, "done": False, "time_total_s": 1.5, "config": {"trial": "x"}}
    report = EpochReport.among(fields)
    assert report == EpochReport(epoch=3, objective=0.5) and report.metrics == {"objective": 0.5}
    assert json.loads(report.text(None)) == {"schema": 1, "epoch": 3, "objective": 0.5}


def test_the_end_has_the_digest_of_the_adapter_as_it_is(tmp_path):
    folder = TrialFolder(tmp_path)
    folder.finish(TrialEnd(status="finished", adapter_digest="of something else"))
    assert folder.end() == TrialEnd(status="finished")
    folder.adapter.mkdir()
    (folder.adapter / "weights").write_text("w")
    folder.finish(TrialEnd(status="finished"))
    end = folder.end()
    assert end is not None and end.adapter_digest and len(end.adapter_digest) == 64
    folder.reopen()
    assert folder.end() is None


def test_an_end_that_was_changed_is_damaged(tmp_path):
    folder = TrialFolder(tmp_path)
    folder.finish(TrialEnd(status="finished", objective=0.5))
    file = tmp_path / "done.json"
    file.write_text(file.read_text().replace("0.5", "0.7"))
    with pytest.raises(
        InputError, match=r"done.json: .*damaged: its check is not that of its content.*Remove the trial"
    ):
        folder.end()


@pytest.mark.parametrize("damage", ["flip", "exchange", "remove"])
def test_an_adapter_or_a_curve_that_is_not_the_one_of_the_end_is_refused(tmp_path, damage):
    def trained(name, value):
        folder = TrialFolder(tmp_path / name)
        folder.begin(TrialRecord(config={}))
        folder.adapter.mkdir()
        (folder.adapter / "weights").write_text(value)
        folder.add_losses(1, [0.5])
        folder.write_epochs([EpochReport(epoch=1, objective=0.25)])
        folder.finish(TrialEnd(status="finished"))
        return folder

    folder, other = trained("a", "w"), trained("b", "v")
    check_adapter(folder.adapter)
    minute_ago = (tmp_path / "a/done.json").stat().st_mtime - 61
    os.utime(tmp_path / "a/done.json", (minute_ago, minute_ago))
    assert folder.epochs() and folder.losses()
    if damage == "flip":
        (folder.adapter / "weights").write_text("x")
        folder.metrics.write_text(folder.metrics.read_text().replace("0.25", "0.75"))
        (tmp_path / "a/losses.jsonl").write_text((tmp_path / "a/losses.jsonl").read_text().replace("0.5", "0.7"))
    elif damage == "exchange":
        shutil.rmtree(folder.adapter)
        shutil.copytree(other.adapter, folder.adapter)
        folder.write_epochs([EpochReport(epoch=1, objective=0.5)])
        folder.add_losses(1, [0.25])
    else:
        shutil.rmtree(folder.adapter)
        folder.metrics.unlink()
        (tmp_path / "a/losses.jsonl").unlink()
    with pytest.raises(
        InputError, match=r"a/adapter: not the adapter that the training ended with.*Or remove the trial"
    ):
        check_adapter(folder.adapter)
    with pytest.raises(InputError, match=r"metrics.jsonl: damaged"):
        folder.epochs()
    with pytest.raises(InputError, match=r"losses.jsonl: damaged|losses.jsonl:1: .*damaged"):
        folder.losses()


def test_an_end_that_the_cache_of_a_shared_file_system_hides_is_seen(tmp_path, monkeypatch):
    """As on NFS, where a listing of the folder ends what a client remembers of a name that was not there."""
    folder, listed, read = TrialFolder(tmp_path), [], Path.read_bytes
    folder.finish(TrialEnd(status="finished"))
    listing = Path.iterdir

    def hidden(path):
        if path.name == "done.json" and not listed:
            raise FileNotFoundError(errno.ENOENT, "No such file", str(path))
        return read(path)

    def lists(path):
        listed.append(path)
        return listing(path)

    monkeypatch.setattr(Path, "read_bytes", hidden)
    monkeypatch.setattr(Path, "iterdir", lists)
    assert folder.end() == TrialEnd(status="finished") and listed == [tmp_path]
    folder.reopen()
    assert folder.end() is None


def test_what_a_trial_ended_with_and_is_not_seen_yet_is_no_damage_in_the_first_minute(tmp_path):
    folder = TrialFolder(tmp_path)
    folder.write_epochs([EpochReport(epoch=1)])
    folder.add_losses(1, [0.5])
    folder.adapter.mkdir()
    (folder.adapter / "weights").write_text("0")
    folder.finish(TrialEnd(status="finished"))
    assert folder.epochs() and folder.losses()
    folder.metrics.write_text("")  # of before
    folder._losses.unlink()
    (folder.adapter / "weights").unlink()
    folder.adapter.rmdir()
    for read in (folder.epochs, folder.losses, folder.check_adapter):
        with pytest.raises(Unseen, match="does not see|keeps what was before"):
            read()
    done = tmp_path / "done.json"
    os.utime(done, (done.stat().st_atime, done.stat().st_mtime - 61))
    for read in (folder.epochs, folder.losses, folder.check_adapter):
        with pytest.raises(InputError, match=r"damaged"):
            read()


@pytest.mark.parametrize("error", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES])
def test_what_the_system_does_not_let_be_read_is_no_damage(tmp_path, monkeypatch, error):
    folder = TrialFolder(tmp_path)
    folder.finish(TrialEnd(status="finished"))
    folder.write_epochs([EpochReport(epoch=1)])

    def fails(path):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(Path, "read_bytes", fails)
    for read in (folder.end, folder.epochs):
        with pytest.raises(Unreadable, match=rf"cannot be read: {os.strerror(error)}. Nothing was removed"):
            read()
    monkeypatch.undo()
    folder.reopen()
    monkeypatch.setattr(Path, "iterdir", fails)
    with pytest.raises(Unreadable, match="cannot be read"):
        folder.end()


@pytest.mark.parametrize("error", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES])
def test_an_adapter_that_the_system_does_not_let_be_read_is_no_other(tmp_path, monkeypatch, error):
    folder = TrialFolder(tmp_path)
    folder.adapter.mkdir()
    (folder.adapter / "weights").write_text("w")

    def fails(_):
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patched, pytest.raises(Unreadable, match="adapter: cannot be read"):
        patched.setattr(os, "scandir", fails)
        folder.finish(TrialEnd(status="finished"))  # it would have no digest
    assert folder.end() is None
    folder.finish(TrialEnd(status="finished"))
    with monkeypatch.context() as patched, pytest.raises(Unreadable, match="adapter: cannot be read"):
        patched.setattr(os, "scandir", fails)
        folder.check_adapter()
    folder.check_adapter()


def test_a_trial_that_other_code_goes_on_with_keeps_the_commits_that_began_it():
    first, second, third = (TrialRecord(config={}, provenance=Provenance(commit=name)) for name in "abc")
    assert first.resumed(second).resumed(third).earlier_commits == ("a", "b")
    assert not Provenance().known and Provenance(commit="a").known


def test_evaluations_come_back_as_they_were_kept(tmp_path):
    old, new = Evaluations(OLD / "evaluations"), Evaluations(tmp_path / "evaluations")
    assert new.studies() == []
    with pytest.raises(InputError, match=r"miniature.json: study 'miniature' has not been evaluated.*dvc repro"):
        new.study("miniature")
    key, measurement = "12eeadb14a0de6c0", old.find_measurement("0123456789abcdef")
    with pytest.raises(InputError, match=rf"{key}.json: no such evaluation. Run dvc repro evaluate"):
        new.read(key)
    assert new.find_measurement(key) is None
    new.write(key, old.read(key))
    new.write_measurement("m", measurement)
    new.write_study(old.study("miniature-points"))
    assert new.find(key) == new.read(key) == old.read(key) and new.find_measurement("m") == measurement
    assert new.studies() == ["miniature-points"] and new.study("miniature-points") == old.study("miniature-points")
    assert new.path(key).read_bytes() == old.path(key).read_bytes()  # schema 1 then and now: the digest stays
    new.path(key).unlink()
    new.path(key).mkdir()
    with pytest.raises(InputError, match=rf"{key}.json: not readable: Is a directory. Remove the file"):
        new.find(key)


def test_a_trial_begins_with_its_record(tmp_path):
    folder = TrialFolder(tmp_path / KEY)
    assert not folder.begun and folder.end() is None and folder.epochs() == [] and folder.losses() == {}
    with pytest.raises(InputError, match="config.json: no such trial. Run `hificl sweep` first"):
        folder.record()
    record = TrialFolder(OLD / "runs" / KEY).record()
    folder.begin(record)
    assert folder.begun and folder.record() == record and folder.config() == TrialFolder(OLD / "runs" / KEY).config()


def test_facts_of_an_event_and_what_a_score_left_out():
    event = JournalEvent(time=1.0, event="sweep ended", seconds=3, why="done")
    assert event.facts == {"seconds": 3, "why": "done"}
    assert json.loads(TrialEnd(status="finished").text())["error"] is None  # said, where an epoch's report is silent
    assert event.number("seconds") == 3.0 and math.isnan(event.number("why")) and math.isnan(event.number("gone"))
    evaluation = Evaluations(OLD / "evaluations").read("12eeadb14a0de6c0")
    assert evaluation.left_out == []
    assert evaluation.model_copy(update={"details": {"left_out": ["a", 1]}}).left_out == ["a", "1"]
    assert as_written({1: (0.5, {2: None})}) == {"1": [0.5, {"2": None}]}
