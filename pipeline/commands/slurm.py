"""`hificl submit slurm` and `work`: processes that lease trials from the store; `hificl notice`: of a spot instance.

`hificl submit slurm`: an array job whose tasks lease trials from the store. Each is one process of `hificl work` in the
place of the batch script, so SLURM's signals reach it: at USR1 (before the time limit) and TERM (preemption,
requeueing) it keeps the trial's last step, and puts itself back into the queue where SLURM does not. With `--nodes` it
is one job of several nodes, which `ray symmetric-run` makes a cluster of; `hificl sweep` runs on the first, and hears
USR1 from the batch script, which puts the job back into the queue.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import PACKAGE
from pipeline.commands.parser import CommandLine, flagged, settable, study_names
from pipeline.core.errors import InputError, WorkError
from pipeline.core.files import write_atomic
from pipeline.core.terminal import Answer

if TYPE_CHECKING:
    from pipeline.config.load import Params
    from pipeline.core.plain_yaml import Json
    from pipeline.plan.plan import Plan

SLURM = Path("runs/.slurm")  # script and logs of tasks
_GRACE = (30, 600)  # seconds that a step, a checkpoint and scontrol take at least, and more than anyone needs
_END_SECONDS = 20  # of these: what a sweep needs beside the step, and scontrol
# The other nodes end by themselves soon after the head: a kill that came late would meet the restarted job's step.
_HEAD_SECONDS = 10
_CLUSTER_SECONDS = 300  # for all nodes' Ray, which is read from the shared path
# The address that this node speaks from to a node whose record it is given: its own name may stand for loopback here.
_ADDRESS = r"""import re, socket, sys
s = socket.socket(type=socket.SOCK_DGRAM)
s.connect((re.search(r"NodeAddr=(\S+)", sys.stdin.read())[1], 9))
print(s.getsockname()[0])"""
# Ray's settings are those of cluster/cluster.yaml, and its `ray stop`; its folder is the user's, for /tmp/ray is one's.
_NODES = """\
export PATH={bin}:"$PATH" RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_enable_autoscaler_v2=0
export DASHBOARD_METRIC_PORT=-1 AUTOSCALER_METRIC_PORT=-1 RAY_enable_metrics_collection=0
export RAY_TMPDIR="${{RAY_TMPDIR:-/tmp/ray-$UID}}" RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT={wait} {keep}={seconds}
unset RAY_ADDRESS
ulimit -Sn 65536 2> /dev/null
pid={folder}/$SLURM_JOB_ID.pid
rm -f "$pid"
trap 'rm -f "$pid"' EXIT
head=$(scontrol show node "$(scontrol show hostnames | tail -n 1)" | {python} -c {address}) || exit 1
head=$head:$((20000 + SLURM_JOB_ID % 10000))
trap 'told=yes; kill -USR1 "$(<"$pid")" || kill $!' USR1  # the sweep keeps the step, or has not begun
trap 'told=' TERM  # SLURM ends every process, and puts the job back into the queue or not
srun --nodes={nodes} --ntasks-per-node=1 --cpu-bind=none --wait={least} \\
  bash -c 'ray stop --force &> /dev/null
    [ "$SLURM_NODEID" = 0 ] || export RAY_gcs_rpc_server_reconnect_timeout_s={gone}
    exec "$@"' - \\
  {ray} symmetric-run --address "$head" --min-nodes {nodes} \\
  --num-cpus={cpus} --num-gpus={gpus} --dashboard-host=127.0.0.1 -- \\
  bash -c 'echo $$ > "$0" && exec "$@"' "$pid" {sweep} --set "sweep.address=$head" &
while kill -0 $! 2> /dev/null; do sleep 1; done  # `wait` misses a signal that comes just before it
wait $!
status=$?
[ "$told" ] && [ $status != 0 ] && scontrol requeue "$SLURM_JOB_ID" && exit
exit $status
"""
_MOST_TASKS = 16  # where no number is asked for
_ANSWER_SECONDS = 30.0  # of SLURM's programs
_NOTICE_SECONDS = 5.0  # between two looks, as Amazon advises


def register(line: CommandLine) -> None:
    """Add the verbs."""
    text = "a job whose tasks lease the open trials, or one of N nodes"
    parser = line.verb("run", "submit", _submit, text, answers=True)
    parser.add_argument("system", choices=["slurm"], help="the queueing system: slurm")
    study_names(parser.add_argument("--study", action="append", metavar="S", help="a study (default: the profile's)"))
    text = f"of the array (default: one a trial, {_MOST_TASKS} at most)"
    parser.add_argument("--tasks", type=int, metavar="N", help=text)
    parser.add_argument("--at-once", type=int, metavar="N", help="tasks that run side by side (default: all)")
    text = "one job of N whole nodes, which Ray makes a cluster of: for trials of several ranks, ASHA and Optuna"
    parser.add_argument("--nodes", type=int, metavar="N", help=text)
    text = "ranks that a node of --nodes trains (default: what a trial needs)"
    parser.add_argument("--per-node", type=int, metavar="N", help=text)
    parser.add_argument("--time", default="01:00:00", metavar="H:M:S", help="limit of a task (default: %(default)s)")
    text = "seconds before the limit in which a task keeps its step (default: %(default)s)"
    parser.add_argument("--grace", type=int, default=90, metavar="SECONDS", help=text)
    text = "a line for #SBATCH, such as --sbatch=--partition=gpu"
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help=text)
    parser.add_argument("--dry-run", action="store_true", help="show the script, and do nothing")
    settable(parser)

    parser = line.verb("run", "work", _work, "lease open trials and train them here, without Ray")
    study_names(parser.add_argument("--study", action="append", metavar="S", help="a study (default: the profile's)"))
    settable(parser)

    text = "wait for a spot instance's notice, then drain its node"
    parser = line.verb("run", "notice", _notice, text)
    parser.add_argument("--node", metavar="ID", help="Ray's name of the node, where this machine has several")


@dataclass(frozen=True)
class Submission(Answer):
    """A job.

    Attributes:
        open: how many trials there are to be trained.
        tasks: of an array: how many lease them; 1 where it has `nodes`.
        script: the file; None: it was only to be shown.
        job: its number; None: it was not submitted.
        text: the script.
    """

    open: int
    tasks: int
    script: str | None
    job: str | None
    text: str
    nodes: int | None = None

    def record(self) -> Json:
        """Return all fields."""
        return asdict(self)

    def shown(self) -> Iterator[str]:
        """Give the script, or what became of it."""
        if self.script is None:
            yield self.text
            return
        size = f"{self.tasks} tasks" if self.nodes is None else f"{self.nodes} nodes"
        yield f"job {self.job}: {size} for {self.open} open trials; script and logs in {SLURM}"
        if self.nodes is None:
            yield "When they have ended, `hificl sweep` brings MLflow in line"


def slurm_script(params: Params, arguments: list[str], count: int, args: argparse.Namespace, home: Path) -> str:
    """Return the job's script.

    Args:
        params: the resources of a worker are a task's, or `count` times those a node's.
        arguments: of `hificl work`, or of `hificl sweep`.
        count: tasks of the array, or workers of a node.
        args: `study`, `at_once`, `nodes`, `time`, `grace` and `sbatch`.
        home: the project's folder, absolute.

    Raises:
        InputError: a number or a time that there cannot be, or an option that is no line of its own.
    """
    from pipeline.pool.processes import KEEP_SECONDS

    sweep, nodes = params.sweep, args.nodes
    for name, value, least, most in (
        ("--nodes", 1 if nodes is None else nodes, 1, math.inf),
        ("--tasks" if nodes is None else "--per-node", count, 1, math.inf),
        ("--at-once", 1 if args.at_once is None else args.at_once, 1, math.inf),
        ("--grace", args.grace, *_GRACE),
    ):  # fmt: skip
        if not least <= value <= most:
            limit = f"{least} or more" if most == math.inf else f"{least} to {most}"
            raise InputError(f"{value} is no number of it", where=name, way_out=f"Give {limit}")
    if _seconds(args.time) <= args.grace:
        way_out = "Give H:M:S or D-H:M:S, longer than --grace"
        raise InputError(f"{args.time!r} is no time with {args.grace} s to spare", where="--time", way_out=way_out)
    for option in args.sbatch:
        if not option.startswith("-") or not option.isprintable():
            way_out = "Write it with its dashes: --sbatch=--partition=gpu"
            raise InputError(f"{option!r} is no option of sbatch", where="--sbatch", way_out=way_out)
    if nodes is None:
        workers, log = 1, "%A_%a"
        size = [f"--array=0-{count - 1}" + (f"%{args.at_once}" if args.at_once else ""), "--nodes=1", "--ntasks=1"]
    else:  # `ray stop`, with which symmetric-run ends, stops another job's Ray on the same node too
        workers, log = count, "%j"
        size = [f"--nodes={nodes}", "--ntasks-per-node=1", "--exclusive"]
    gpus = math.ceil(workers * sweep.gpus_per_worker)
    options = [
        f"--job-name={'-'.join(['hificl', *(args.study or [])])}", *size,
        f"--cpus-per-task={math.ceil(workers * max(sweep.cpus_per_worker, sweep.threads_per_worker))}",
        *([f"--gres=gpu:{gpus}"] if gpus else []),
        f"--time={args.time}", f"--signal=B:USR1@{args.grace}", "--requeue", "--open-mode=append",
        f"--output={SLURM}/{log}.log", *args.sbatch,
    ]  # fmt: skip
    lines = ["#!/bin/bash", *(f"#SBATCH {shlex.quote(option)}" for option in options)]
    command = shlex.join([sys.executable, "-m", PACKAGE, "work" if nodes is None else "sweep", *arguments])
    go = f"exec {command}  # in the shell's place, so that signals reach it\n"
    if nodes is not None:
        programs, python = Path(sys.executable).parent, shlex.quote(sys.executable)
        go = _NODES.format(
            bin=shlex.quote(str(programs)), python=python, ray=shlex.quote(str(programs / "ray")), folder=SLURM,
            wait=_CLUSTER_SECONDS, gone=_HEAD_SECONDS, least=6 * _HEAD_SECONDS, keep=KEEP_SECONDS,
            seconds=args.grace - _END_SECONDS, address=shlex.quote(_ADDRESS), nodes=nodes, gpus=gpus, sweep=command,
            cpus=math.ceil(workers * sweep.cpus_per_worker),
        )  # fmt: skip
    return "\n".join([*lines, f"cd {shlex.quote(str(home))} || exit 1", go])


def _seconds(limit: str) -> int:
    """Return a time as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; 0: it is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit, re.ASCII)
    if match is None:
        return 0
    days, *fields = match.groups()
    clock = [int(field) for field in fields if field is not None]
    if days is None and len(clock) < 3:
        clock.insert(0, 0)
    hours, minutes, seconds = [*clock, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _submit(args: argparse.Namespace) -> Submission:
    """Write the script and give it to sbatch."""
    from pipeline.config.load import load
    from pipeline.plan.plan import all_cells, make_plan, places
    from pipeline.pool import ensure_token
    from pipeline.records.store import TrialStore
    from pipeline.sweep.leases import leasable, open_again
    from pipeline.sweep.train import check_open_engines, check_open_pictures

    for name in ("--tasks", "--at-once") if args.nodes is not None else ("--per-node",):
        if (value := getattr(args, name[2:].replace("-", "_"))) is not None:
            why = "--nodes makes one job, which is no array" if args.nodes is not None else "it is of a job of nodes"
            way_out = f"Leave {name} out" if args.nodes is not None else "Give --nodes too"
            raise InputError(f"{value}: {why}", where=name, way_out=way_out)
    params, folders = load(overrides=args.set), places()
    store = TrialStore(folders.runs)
    cells = all_cells(params, args.study or params.run.studies, folders)
    arguments = [*flagged("--study", args.study or []), *flagged("--set", args.set)]
    if args.nodes is not None:
        plan = make_plan(params, cells, folders, store.objective)
        todo = plan.open_keys(store.settled)
        tasks, text = 1, slurm_script(params, arguments, _workers(plan, args.nodes, args.per_node), args, Path.cwd())
    else:
        plan = leasable(params, cells, folders)
        todo = plan.open_keys(store.settled)
        tasks = max(1, min(len(todo), _MOST_TASKS)) if args.tasks is None else args.tasks
        text = slurm_script(params, arguments, tasks, args, Path.cwd())
    if args.dry_run:
        return Submission(len(todo), tasks, None, None, text, args.nodes)
    if not todo and not plan.searched:
        raise InputError("every trial is done", where=str(folders.runs), way_out="`hificl sweep` brings MLflow in line")
    if shutil.which("sbatch") is None:
        raise InputError(
            "no such program here", where="sbatch",
            way_out="Submit where SLURM is; --dry-run shows the script, `hificl work` trains on this machine",
        )  # fmt: skip
    check_open_engines(plan, store)
    check_open_pictures(plan, store)
    if args.nodes is None:
        with store.lease(todo[0], "a submission"):  # which no sweep lets in
            open_again(plan, store)
    else:
        with store.lock("a submission"):  # nor do processes that lease
            ensure_token()  # Ray's own would be open to others
    file = SLURM / ("array.sh" if args.nodes is None else "nodes.sh")
    write_atomic(file, text)
    answer = _asked("sbatch", "--parsable", str(file))
    if answer is None or answer.returncode:
        why = "no answer" if answer is None else answer.stderr.strip().partition("\n")[0]
        way_out = f"Mend that, then run `sbatch {file}`"
        raise WorkError(f"sbatch did not take the script: {why}", where=str(file), way_out=way_out)
    return Submission(len(todo), tasks, str(file), answer.stdout.strip().partition(";")[0], text, args.nodes)


def _workers(plan: Plan, nodes: int, asked: int | None) -> int:
    """Return how many workers a node of a job of nodes has: as many as are asked for, or a trial needs.

    Raises:
        InputError: a trial needs more.
    """
    configs = [*plan.trials.values(), *plan.examples]
    ranks = max((config.world_size for config in configs if config.trained), default=1)
    need = math.ceil(ranks / max(1, nodes))
    if asked is not None and 0 < asked < need and nodes > 0:
        raise InputError(
            f"a trial has {ranks} ranks, --nodes {nodes} with --per-node {asked} hold {nodes * asked}",
            where=f"train.world_size: {ranks}",
            way_out=f"Give --per-node {need}, or --nodes {math.ceil(ranks / asked)}",
        )
    return need if asked is None else asked


def _asked(*command: str) -> subprocess.CompletedProcess[str] | None:
    """Run one of SLURM's programs; None where there is none, or no answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ANSWER_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None


def _work(args: argparse.Namespace) -> None:
    """Lease and train until nothing is left, or a signal comes."""
    from pipeline.config.load import load
    from pipeline.core.progress import say
    from pipeline.pool.processes import worker_environment

    params = load(overrides=args.set)
    os.environ |= worker_environment(params.sweep)  # before torch is imported, which reads it
    from pipeline.sweep.leases import Broken, work

    try:
        done = work(params, args.study or params.run.studies)
    except Broken as error:  # a GPU's context, or the memory, may be broken too
        say(f"begins anew: {error}")
        os.execv(sys.executable, [sys.executable, "-m", PACKAGE, *sys.argv[1:]])  # noqa: S606 - no shell is meant
    if done.signal is not None:
        if requeued():
            return
        raise KeyboardInterrupt
    if done.held:
        say(f"{done.held} open trials are held by other processes")
    if done.failed:
        key, why = next(iter(done.failed.items()))
        way_out = "Mend the cause and submit again"
        raise WorkError(f"{len(done.failed)} trials failed; the first, {key}: {why}", where="work", way_out=way_out)


def _notice(args: argparse.Namespace) -> None:
    """Look for the notice until it comes, then let Ray drain this node."""
    from pipeline.core.machine import notice
    from pipeline.core.progress import say
    from pipeline.pool.cluster import drain

    seconds = notice()  # raises where there is no such service at all
    while seconds is None:
        time.sleep(_NOTICE_SECONDS)
        with suppress(WorkError):  # one look that fails is no reason to look no more
            seconds = notice()
    say(f"this instance is taken away in {seconds:.0f} s; nothing new begins here, and what trains keeps its last step")
    drain(seconds, args.node)


def requeued() -> bool:
    """Put this task back into SLURM's queue, where it is one that still runs; return whether it will go on.

    One that SLURM ends itself (cancelled, requeued, its time over) is in another state by now, and stays as it is.
    """
    from pipeline.core.progress import say

    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        job = f"{os.environ.get('SLURM_ARRAY_JOB_ID')}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    shown = _asked("scontrol", "show", "job", "--oneliner", job)
    if shown is None or "JobState=RUNNING" not in shown.stdout:
        return False
    asked = _asked("scontrol", "requeue", job)
    if asked is None or asked.returncode:
        say(f"SLURM does not requeue task {job}: {asked.stderr.strip() if asked else 'no answer'}")
        return False
    say(f"task {job} is back in the queue")
    return True
