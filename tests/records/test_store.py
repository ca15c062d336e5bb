import errno
import multiprocessing
import os
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipeline.config.trial import TrialConfig
from pipeline.core.errors import InputError
from pipeline.core.files import Superseded
from pipeline.records import Unreadable
from pipeline.records import store as stores
from pipeline.records.store import Displaced, TrialStore
from pipeline.records.trial import Provenance, TrialEnd

CONFIG = TrialConfig(
    backbone="b", backbone_digest="0", task="t", manifest_digest="1", method="hificl", options={"rank": 2}
)


def test_a_trial_is_found_again_by_its_content(tmp_path):
    store = TrialStore(tmp_path)
    origin = Provenance(commit="abc")
    store.open(CONFIG, origin)
    store.open(CONFIG)  # a slot takes it up, which knows no provenance
    assert store.config(CONFIG.key) == CONFIG and store.record(CONFIG.key).provenance == origin
    store.open(CONFIG, Provenance(commit="def"))
    assert store.record(CONFIG.key).earlier_commits == ("abc",)
    assert store.all_keys() == [CONFIG.key] and not store.finished(CONFIG.key)


@pytest.mark.parametrize(
    ("status", "final"), [("finished", True), ("diverged", True), ("stopped", False), ("failed", False)]
)
def test_only_ends_that_would_repeat_are_final(tmp_path, status, final):
    store = TrialStore(tmp_path)
    store.open(CONFIG)
    store.finish(CONFIG.key, TrialEnd(status=status))
    assert store.finished(CONFIG.key) is final
    store.reopen(CONFIG.key)
    assert store.done(CONFIG.key) is None


def test_a_damaged_record_says_what_to_remove(tmp_path):
    store = TrialStore(tmp_path)
    folder = store.open(CONFIG)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json: damaged.*Remove the trial's folder"):
        store.config(CONFIG.key)


def _hold(root, ready, release):
    with TrialStore(root).lock("another sweep"):
        ready.set()
        release.wait(60)


def test_a_second_sweep_is_told_who_holds_the_store(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, release))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(InputError, match=rf"held by another sweep, pid {other.pid} on .* since"):
            with TrialStore(tmp_path).lock("a sweep"):
                pass
    finally:
        release.set()
        other.join(60)
    with TrialStore(tmp_path).lock("a sweep"):
        pass


def test_an_experiment_in_a_copy_waits_for_the_store(tmp_path, capsys):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, release))
    other.start()
    try:
        assert ready.wait(60)
        threading.Timer(2.0, release.set).start()
        with TrialStore(tmp_path).lock("a sweep", wait=True):
            assert release.is_set()
    finally:
        release.set()
        other.join(60)
    assert f"a sweep waits for {tmp_path}, held by another sweep, pid {other.pid}" in capsys.readouterr().err


def test_who_held_the_store_before_ends_and_reopens_nothing_of_the_one_who_holds_it(tmp_path, monkeypatch):
    """A machine that stood still, or was cut off, has lost its lock without a word."""
    monkeypatch.setattr(stores, "held", lambda *_, **__: nullcontext())
    before, after = TrialStore(tmp_path), TrialStore(tmp_path)
    with before.lock("a sweep"):
        before.open(CONFIG)
        before.check_held()
        before.finish(CONFIG.key, TrialEnd(status="stopped"))
        before.reopen(CONFIG.key)
        before.reopen(CONFIG.key)  # an end that is not there is none to take back
        with after.lock("a sweep"):
            after.finish(CONFIG.key, TrialEnd(status="failed", error="of the second"))
            with pytest.raises(Displaced, match="another process has taken the trial store over.*run again"):
                before.check_held()
            for act in (before.reopen, lambda key: before.finish(key, TrialEnd(status="finished"))):
                with pytest.raises(Superseded):
                    act(CONFIG.key)
            after.check_held()
            assert after.done(CONFIG.key).error == "of the second"
            after.reopen(CONFIG.key)
            assert after.done(CONFIG.key) is None
    assert not list((tmp_path / stores.HOLDER).iterdir())


def test_a_disk_that_is_full_or_sick_takes_no_store_away(tmp_path, monkeypatch):
    store = TrialStore(tmp_path)
    with store.lock("a sweep"):
        for number in (errno.ENOSPC, errno.EIO, errno.EMFILE):

            def fails(*_: object, number: int = number, **__: object) -> None:
                raise OSError(number, "of the disk")

            with monkeypatch.context() as broken:
                broken.setattr(Path, "touch", fails)
                store.check_held()


def test_a_store_that_cannot_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    store = TrialStore(tmp_path)
    assert TrialStore(tmp_path / "none").all_keys() == []
    store.open(CONFIG)

    def fails(_):
        raise OSError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched, pytest.raises(Unreadable, match="cannot be read: Permission denied"):
        patched.setattr(os, "listdir", fails)
        store.all_keys()
    assert store.all_keys() == [CONFIG.key]
    with store.lease(CONFIG.key, "work"), monkeypatch.context() as patched:
        patched.setattr(os, "listdir", fails)
        with pytest.raises(Unreadable, match="cannot be read: Permission denied"), store.lock("a sweep"):
            pass
