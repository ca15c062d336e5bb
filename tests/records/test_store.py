import multiprocessing
import threading

import pytest

from pipeline.config.trial import TrialConfig
from pipeline.core.errors import InputError
from pipeline.records.store import TrialStore
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
