"""Processes that lease trials: a trial is one process's, a signal keeps the step, a sweep is kept out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path

import pytest

from pipeline.commands.slurm import slurm_script
from pipeline.config.load import load
from pipeline.core.errors import InputError
from pipeline.plan.plan import Inputs, all_cells, as_given, places
from pipeline.records.journal import Journal
from pipeline.records.store import LEASES, TrialStore
from pipeline.records.trial import Attempts
from pipeline.sweep import leases
from pipeline.train.workbench import Workbench
from pipeline.workspace import make_workspace
from tests.conftest import ROOT
from tests.e2e.conftest import Project
from tests.sweep.conftest import SHORT, worked

HOLD = """
import sys, time
from pipeline.records.store import TrialStore
store = TrialStore(sys.argv[1])
with store.lease(sys.argv[2], "another task") if len(sys.argv) > 2 else store.lock("a sweep"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held():
    """`held(store)` or `held(store, key)`: another process holds the store, or a trial of it."""
    processes = []

    def hold(*words: object) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, *map(str, words)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    yield hold
    for process in processes:
        process.kill()
        process.wait()


def kept(store: TrialStore, key: str) -> list[str]:
    return sorted(path.name for path in store.trial(key).checkpoint.iterdir())


def test_a_trial_that_another_process_holds_is_left_to_it_and_a_killed_one_holds_none(plan, held, tmp_path):
    store, (first, second) = TrialStore(tmp_path / "runs"), plan.open_keys(lambda key: False)
    other = held(store.root, first)
    assert worked(plan).held == 1 and store.done(first) is None and store.done(second).status == "finished"
    with pytest.raises(InputError, match=rf"runs: held by another task, pid {other.pid} on"), store.lock("a sweep"):
        pass
    other.kill()
    other.wait()
    assert worked(plan) == leases.Worked() and store.done(first).status == "finished"
    assert [path.name for path in (store.root / LEASES).iterdir() if path.stat().st_size] == []
    events = [json.loads(line) for line in (store.root / "journal.jsonl").read_text().splitlines()]
    assert [event["trial"] for event in events if event["event"] == "trial leased"] == [second, first]
    with store.lock("a sweep"):
        pass


def test_nothing_is_leased_while_a_sweep_holds_the_store(plan, held, tmp_path):
    sweep = held(tmp_path / "runs")
    with pytest.raises(InputError, match=rf"runs: held by a sweep, pid {sweep.pid} on.*run again"):
        worked(plan)
    assert TrialStore(tmp_path / "runs").all_keys() == []


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_keeps_the_step_and_the_next_process_ends_with_the_same_bits(
    plan, trial, tmp_path, monkeypatch, number
):
    plan.trials.pop(max(plan.trials))
    (key,) = plan.trials
    store, count = TrialStore(tmp_path / "runs"), Workbench._count

    def disturbed(self):
        if self.loop.trials[0].step == 3:
            os.kill(os.getpid(), number)
        count(self)

    before = {each: signal.getsignal(each) for each in leases.SIGNALS}
    with monkeypatch.context() as patched:
        patched.setattr(Workbench, "_count", disturbed)
        assert worked(plan).signal == number
    for each, handler in before.items():  # who was told to end hears no second signal
        signal.signal(each, handler)
    assert kept(store, key) == ["epoch-0001", "epoch-0001-step-000001"] and store.done(key) is None
    assert store.tried(key) == Attempts() and not (store.folder(key) / ".writing").exists()
    assert worked(plan) == leases.Worked()
    undisturbed = trial("lora", tmp_path / "whole", seed=plan.trials[key].seed, **SHORT)
    bench = Workbench("cpu")
    bench.admit(undisturbed)
    while not bench.advance()[-1].end:
        pass
    whole = TrialStore(tmp_path / "whole")
    assert store.done(key).adapter_digest == whole.done(key).adapter_digest
    assert store.done(key).losses_digest == whole.done(key).losses_digest
    assert kept(store, key) == kept(whole, key) == ["epoch-0001", "epoch-0002"]


def test_a_trial_whose_processes_die_again_and_again_fails_and_is_open_again_when_submitted_anew(plan, tmp_path):
    store, key = TrialStore(tmp_path / "runs"), min(plan.trials)
    plan.trials.pop(max(plan.trials))
    most = plan.params.sweep.retry.max_attempts
    store.note_tried(key, Attempts(attempts=most, error="RuntimeError: no"))
    assert worked(plan).failed == {key: "RuntimeError: no"}
    assert (store.done(key).status, store.done(key).attempts) == ("failed", most)
    assert worked(plan) == leases.Worked()  # nobody tries it again by itself
    assert leases.open_again(plan, store) == [key]
    store.note_tried(key, Attempts(attempts=most, at="epoch-0001"))  # it has come further or begun anew since
    assert worked(plan) == leases.Worked() and store.done(key).status == "finished"


def test_an_error_that_may_have_broken_the_process_is_counted_and_ends_it(plan, tmp_path, monkeypatch):
    def broken(self):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(Workbench, "advance", broken)
    with pytest.raises(leases.Broken, match="no kernel image"):
        worked(plan)
    store, key = TrialStore(tmp_path / "runs"), plan.open_keys(lambda key: False)[0]
    assert store.tried(key) == Attempts(attempts=1, error="RuntimeError: no kernel image is available")


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (["sweep.scheduler=asha"], "sweep.scheduler: asha: compares trials while they train, which needs a head"),
        (
            ["train.world_size=2"],
            "train.world_size: 2: makes a trial of several processes.*`hificl submit slurm --nodes N`",
        ),
    ],
)
def test_what_needs_a_head_is_refused(given, what, monkeypatch, tmp_path):
    monkeypatch.setattr(Inputs, "digests", lambda self, studies: as_given(self.params))
    params, folders = load(ROOT / "params.yaml", overrides=given), places(tmp_path)
    cells = all_cells(params, ["hificl-figure7"], folders)
    with pytest.raises(InputError, match=what):
        leases.leasable(params, cells, folders)


@pytest.fixture
def lab(small_world, tmp_path) -> Project:
    """A workspace with two trials and one more, which the best of the two asks for: it lies at an end of its space."""
    with chdir(ROOT):
        make_workspace(tmp_path / "lab", profile="mini")
    made = Project(tmp_path / "lab")
    shutil.copytree(small_world / "mini-vqa", made.folder / "data/manifests/mini-vqa")
    budget = {"trials": 2, "widen": 1, "spaces": {"lora": {"learning_rate": [0.001, 0.002]}}}
    study = {"title": "x", "backbones": ["idefics2-8b-base"], "tasks": ["vqav2"], "budget": budget,
             "methods": {"lora": {"rank": 2}}}  # fmt: skip

    def edit(raw):
        raw["studies"] = {"small": study}
        raw["profile"] = "tiny"
        raw["profiles"]["tiny"] = {**raw["profiles"]["mini"], "study_changes": {}}
        raw["profiles"]["tiny"].update(
            studies=["small"], tasks=["mini-vqa"], backbones=["mini-idefics2"], methods={},
            sweep={"checkpoint_seconds": 1e-6},
            train={
                "num_train_samples": 16, "num_selection_samples": 2, "micro_batch_size": 2, "accumulation": 1,
                "epochs_below_1000": 2, "selection_metric": "loss",
            },
        )  # fmt: skip

    made.change(edit)
    return made


@pytest.mark.slow
def test_of_two_processes_one_is_killed_within_an_epoch_and_the_other_takes_its_trial(lab, tmp_path):
    whole = shutil.copytree(lab.folder, tmp_path / "whole", symlinks=True)
    store, undisturbed = TrialStore(lab.folder / "runs"), TrialStore(whole / "runs")
    begun = [lab.start("-m", "pipeline", "work")]

    def leased(pid: int) -> list[str]:
        events = Journal(store.root, whole=True).news()
        return [str(e.facts["trial"]) for e in events if e.event == "trial leased" and f"pid {pid} " in e.facts["by"]]

    def until(holds) -> None:
        end = time.monotonic() + 240
        while not holds():
            assert all(p.poll() in (None, -signal.SIGKILL) for p in begun), (lab.folder / "started.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.01)

    try:
        until(lambda: list(store.root.glob("*/checkpoint/epoch-*-step-*/state.json")))
        begun[0].send_signal(signal.SIGSTOP)
        (killed,) = leased(begun[0].pid)
        assert store.done(killed) is None
        begun.append(lab.start("-m", "pipeline", "work"))
        until(lambda: leased(begun[1].pid))  # which leaves the first one's alone
        begun[0].kill()
        assert begun[1].wait(240) == 0, (lab.folder / "started.log").read_text()
    finally:
        for process in begun:
            process.kill()
            process.wait()
    first, second, third = leased(begun[1].pid)
    assert second == killed and len({first, second, third}) == 3
    with chdir(whole):
        params, folders = load(), places()
        cells = all_cells(params, ["small"], folders)
        for _ in range(2):
            assert worked(leases.leasable(params, cells, folders)) == leases.Worked()
    assert undisturbed.all_keys() == store.all_keys() == sorted((first, second, third))
    for key in store.all_keys():
        assert store.done(key).status == "finished" and store.trial(key).losses() == undisturbed.trial(key).losses()
        assert store.done(key).adapter_digest == undisturbed.done(key).adapter_digest


def asked(*words: str):
    from pipeline.cli import command_line

    return command_line().parse_args(["submit", "slurm", *words])


def test_the_script_of_an_array_job():
    params = load(ROOT / "params.yaml", overrides=["sweep.gpus_per_worker=1", "sweep.threads_per_worker=4"])
    args = asked("--study", "hificl-figure7", "--at-once", "2", "--sbatch=--comment=two words", "--time", "0:59:00")
    text = slurm_script(params, ["--set", "x=$(rm -r .)"], 8, args, Path("/some/my lab"))
    assert (
        text
        == f"""#!/bin/bash
#SBATCH --job-name=hificl-hificl-figure7
#SBATCH --array=0-7%2
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --gres=gpu:1
#SBATCH --time=0:59:00
#SBATCH --signal=B:USR1@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/.slurm/%A_%a.log
#SBATCH '--comment=two words'
cd '/some/my lab' || exit 1
exec {sys.executable} -m pipeline work --set 'x=$(rm -r .)'  # in the shell's place, so that signals reach it
"""
    )
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_the_script_of_a_job_of_nodes():
    given = ["sweep.gpus_per_worker=1", "sweep.threads_per_worker=4", "sweep.cpus_per_worker=1.5"]
    args = asked("--nodes", "3", "--grace", "120")
    text = slurm_script(
        load(ROOT / "params.yaml", overrides=given), ["--set", "x=$(rm -r .)"], 2, args, Path("/my lab")
    )
    head, script = text.split("cd '/my lab' || exit 1\n")
    assert (
        head
        == """#!/bin/bash
#SBATCH --job-name=hificl
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:2
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/.slurm/%j.log
"""
    )
    sweep = f"{sys.executable} -m pipeline sweep --set 'x=$(rm -r .)' --set \"sweep.address=$head\" &"
    for part in (
        sweep,
        "--min-nodes 3 ",
        "--num-cpus=3 --num-gpus=2",
        "HIFICL_KEEP_SECONDS=100",
        "RAY_AUTH_MODE=token",
    ):
        assert part in script
    exporters = {"DASHBOARD_METRIC_PORT=-1", "AUTOSCALER_METRIC_PORT=-1", "RAY_enable_metrics_collection=0"}
    assert exporters <= set(script.split())
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_the_batch_script_passes_usr1_on_to_the_sweep_and_puts_the_job_back_into_the_queue(tmp_path):
    """With SLURM's programs and Ray's played, whose srun is in the place of what it runs."""
    args = asked("--nodes", "2")
    (tmp_path / "bin").mkdir()
    (tmp_path / "runs/.slurm").mkdir(parents=True)
    played = {
        "scontrol": """
            case "$1 $2" in
                "show hostnames") echo a; echo b ;;
                "show node") echo "NodeName=$3 NodeAddr=127.0.0.1 Port=1" ;;
                *) echo "$1 $2" ;;
            esac""",
        "srun": 'until [ "$1" = bash ]; do shift; done; [ -e early ] && touch begun && exec sleep 60; exec "$@"',
        "ray": '[ $1 = stop ] && exit; echo "$1 $3"; until [ "$1" = -- ]; do shift; done; shift; exec "$@"',
        "python": """
            [ "$1" = -c ] && exec python3 "$@"
            trap "echo told; exit 7" USR1
            trap "echo ended; exit 5" TERM
            echo "$@"
            touch begun
            while :; do sleep 0.1; done""",
    }
    for name, body in played.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "executable", str(tmp_path / "bin/python"))
        text = slurm_script(load(ROOT / "params.yaml"), [], 1, args, tmp_path)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "412345"}

    def ended(*signals: int) -> tuple[int, list[str]]:
        (tmp_path / "begun").unlink(missing_ok=True)
        batch = subprocess.Popen(["bash", "-c", text], stdout=subprocess.PIPE, text=True, env=environment)
        end = time.monotonic() + 60
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < end and batch.poll() is None
            time.sleep(0.05)
        for number in signals:
            batch.send_signal(number)
            time.sleep(1.5)
        if signal.SIGUSR1 not in signals:
            os.kill(int((tmp_path / "runs/.slurm/412345.pid").read_text()), signal.SIGTERM)  # as SLURM does
        said = batch.communicate(timeout=30)[0].splitlines()
        assert list((tmp_path / "runs/.slurm").iterdir()) == []
        return batch.returncode, said

    begun = ["symmetric-run 127.0.0.1:22345", "-m pipeline sweep --set sweep.address=127.0.0.1:22345"]
    assert ended(signal.SIGUSR1) == (0, [*begun, "told", "requeue 412345"])
    assert ended(signal.SIGTERM) == (5, [*begun, "ended"])
    (tmp_path / "early").touch()  # Ray has not come up
    assert ended(signal.SIGUSR1) == (0, ["requeue 412345"])


def test_a_job_of_nodes_holds_trials_of_several_ranks_and_what_compares_them(lab, monkeypatch):
    monkeypatch.chdir(lab.folder)
    two = ("--set", "train.world_size=2", "--set", "train.zero_stage=2", "--set", "sweep.scheduler=asha")
    for words, cpus in ((("--nodes", "2"), 1), (("--nodes", "1"), 2), (("--nodes", "2", "--per-node", "3"), 3)):
        args = asked("--dry-run", *two, *words)
        submission = args.func(args)
        assert (submission.open, submission.nodes) == (2, int(words[1])) and submission.job is None
        assert f"--num-cpus={cpus} " in submission.text
    args = asked("--dry-run", "--nodes", "1", "--per-node", "1", *two)
    with pytest.raises(
        InputError, match=r"world_size: 2: a trial has 2 ranks.*hold 1\. Give --per-node 2, or --nodes 2"
    ):
        args.func(args)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--nodes", "2", "--tasks", "4"), r"--tasks: 4: --nodes makes one job.*Leave --tasks out"),
        (("--nodes", "2", "--at-once", "1"), r"--at-once: 1: --nodes makes one job"),
        (("--per-node", "2"), r"--per-node: 2: it is of a job of nodes\. Give --nodes too"),
        (("--nodes", "0"), r"--nodes: 0 is no number of it\. Give 1 or more"),
        (("--nodes", "1", "--per-node", "0"), r"--per-node: 0 is no number"),
    ],
)
def test_options_that_do_not_go_together_are_refused(lab, monkeypatch, words, what):
    monkeypatch.chdir(lab.folder)
    args = asked(*words)
    with pytest.raises(InputError, match=what):
        args.func(args)
    assert not (lab.folder / "runs/.slurm").exists()


def test_where_slurm_is_missing_the_script_is_shown_and_nothing_submitted_or_written(lab, monkeypatch):
    monkeypatch.chdir(lab.folder)
    monkeypatch.setenv("PATH", "")
    shown = asked("--dry-run")
    submission = shown.func(shown)
    assert (submission.open, submission.tasks, submission.job, submission.script) == (2, 2, None, None)
    assert f"cd {lab.folder} || exit 1" in submission.text and list(submission.shown()) == [submission.text]
    args = asked()
    with pytest.raises(InputError, match=r"sbatch: no such program here\. Submit where SLURM is"):
        args.func(args)
    assert not (lab.folder / "runs/.slurm").exists()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--tasks", "0"), "--tasks: 0 is no number of it. Give 1 or more"),
        (("--at-once", "0"), "--at-once: 0 is no number"),
        (("--grace", "5"), "--grace: 5 is no number of it. Give 30 to 600"),
        (("--sbatch", "partition=gpu"), "--sbatch: 'partition=gpu' is no option of sbatch"),
        (("--sbatch=--x\nrm -r .",), "--sbatch: '--x.*' is no option of sbatch"),
        (("--time", "1:00:00\nrm -r ."), "--time: '1:00:00.*' is no time"),
        (("--time", "1:30", "--grace", "90"), "--time: '1:30' is no time with 90 s to spare. Give H:M:S"),
        (("--time", "1"), "--time: '1' is no time with 90 s to spare"),
    ],
)
def test_what_sbatch_would_misread_is_refused(words, what):
    args = asked(*words)
    with pytest.raises(InputError, match=what):
        slurm_script(load(ROOT / "params.yaml"), [], 1 if args.tasks is None else args.tasks, args, ROOT)
