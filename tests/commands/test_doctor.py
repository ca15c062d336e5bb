"""What the doctor says of the places around a project: Ray's folder, and a checkout that git refuses."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.commands import doctor
from pipeline.config.load import load
from pipeline.core import machine
from pipeline.core.locks import held
from pipeline.plan import plan
from pipeline.train.counting import GIB, BackboneMemory, StepMemory
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def params():
    return load(ROOT / "params.yaml")


def test_a_folder_that_ray_cannot_take_is_missing(params, monkeypatch):
    assert next(doctor._ray(params, ROOT)).state == doctor.OK
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 60)
    found = next(doctor._ray(params, ROOT))
    assert found.state == doctor.MISSING
    assert "too long for Ray's sockets (65 bytes, at most 39)" in found.detail and "Set RAY_TMPDIR" in found.way_out


def test_a_checkout_that_git_refuses_is_noted(params, monkeypatch):
    (found,) = doctor._code(params, ROOT)
    if found.state == doctor.NOTE:
        pytest.skip("no git checkout here")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    (refused,) = doctor._code(params, ROOT)
    assert refused.state == doctor.NOTE and "git config --global --add safe.directory" in refused.detail
    assert refused.detail.startswith(found.detail[:19])  # the commit


def test_the_disk_that_visual_tokens_want_is_said(monkeypatch):
    """Idefics2 has 64 tokens an image and LLaVA 729, both 4,096 wide, in fp16 (HiFICL Table 5)."""
    given = "studies.own={title: o, backbones: [BACKBONE], tasks: [okvqa], methods: {zero-shot: {}}}"
    said = {}
    for name, tokens in (("idefics2-8b-base", 64), ("llava-interleave-7b", 729)):
        chosen = [given.replace("BACKBONE", name), "run.studies=[own]", "train.precision=bf16"]
        params = load(ROOT / "params.yaml", chosen, profile="real")
        images = 1500 + 5046  # of OK-VQA's evaluation split
        gib = tokens * 4096 * 2 * images / 2**30
        for free, state in ((gib / 0.8 + 6, doctor.OK), (gib / 0.8 + 4, doctor.NOTE)):
            monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free * 2**30))
            disk, tokens_found = doctor._disk(params, ROOT)
            assert disk.state == (doctor.OK if free > 5 else doctor.MISSING) and tokens_found.state == state
            said[name] = tokens_found.detail
        assert said[name].startswith(f"{gib:.0f} GiB where every image's are kept")


def test_what_fits_which_card_is_said():
    steps = [StepMemory("hificl", 2, 7 * GIB, GIB, 0), StepMemory("lora", 2, 40 * GIB, 7 * GIB, 0)]
    of = BackboneMemory("big", "bf16", "none", 15 * GIB, steps, {0: GIB})
    everywhere = doctor._memory(of, (24, 48, 80))
    assert everywhere.state == doctor.OK and everywhere.detail.endswith(
        "24 GiB: hificl with train.gradient_checkpointing alone; not lora, 48 GiB: lora with "
        "train.gradient_checkpointing alone, 80 GiB: all methods fit"
    )
    here = doctor._memory(of, (24,))
    assert here.state == doctor.NOTE and "train.gradient_checkpointing: true" in here.way_out
    assert doctor._memory(of, (80,)).state == doctor.OK


def finding(checks, name):
    (check,) = [check for check in checks if check.name == name]
    return check


@pytest.mark.parametrize("case", ["no home", "read-only home", "a token of another's"])
def test_a_home_that_gives_no_token_is_missing(params, monkeypatch, tmp_path, case):
    for name in machine.TOKEN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert finding(doctor._machine(params, ROOT), "home").state == doctor.OK
    if case == "no home":
        monkeypatch.setattr(Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home"))))
    else:
        real = os.access  # the tests' user may be root, who may do everything
        (tmp_path / ".ray").mkdir()
        if case != "read-only home":
            (tmp_path / ".ray/auth_token").write_text("t")
        monkeypatch.setattr(os, "access", lambda path, how: not str(path).startswith(str(tmp_path)) and real(path, how))
    check = finding(doctor._machine(params, ROOT), "home")
    assert check.state == doctor.MISSING and "Set HOME to a folder that can be written" in check.way_out
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert finding(doctor._machine(params, ROOT), "home").state == doctor.OK


@pytest.mark.parametrize(
    ("before", "says"),
    [
        ("ulimit -n 64", "ulimit -n: a process may open 64 files, Ray needs 512. Call `ulimit -n 65536`"),
        ("export RAY_TMPDIR=/tmp/" + "x" * 60, "too long for Ray's sockets"),
        ("unset HOME; export RAY_TMPDIR=/nowhere", "RAY_TMPDIR"),
    ],
)
def test_a_machine_that_cannot_start_ray_is_refused_at_once(before, says):
    """By the very call that a sweep makes before it starts its driver; before, it took minutes and three attempts."""
    code = "import sys; from pipeline.cli import guarded"
    code += "; from pipeline.core import machine; sys.exit(guarded(machine.require))"
    started = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", f'{before}; exec "$0" -c "$1"', sys.executable, code], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert time.monotonic() - started < 60


def test_a_tiny_folder_for_ray_is_refused(params, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(total=1 << 18, used=0, free=1 << 18))
    check = finding(doctor._machine(params, ROOT), "Ray's folder")
    assert (
        check.state == doctor.MISSING and "0.2 MiB free, Ray needs 64" in check.detail and "RAY_TMPDIR" in check.way_out
    )


def test_little_shared_memory_is_noted(params, monkeypatch):
    """Ray goes on by the disk, which is slower and gives the same."""
    for free, state in ((1 << 16, doctor.NOTE), (1 << 30, None)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _path, free=free: SimpleNamespace(free=free))
        checks = {check.name: check for check in doctor._ray(params, ROOT)}
        assert (checks["shared memory"].state if state else checks.get("shared memory")) == state
        assert not state or "--shm-size" in checks["shared memory"].way_out


def test_a_user_without_a_name_gets_one(monkeypatch):
    """A container's random uid, which MLflow asks for the name of."""

    def unknown():
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setenv("LOGNAME", "")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    monkeypatch.setattr("getpass.getuser", unknown)
    machine.home()
    assert os.environ["LOGNAME"] == f"uid-{os.getuid()}"


def test_few_open_files_become_as_many_as_are_allowed():
    code = "import resource; from pipeline.core import machine; print(machine.open_files(), resource.getrlimit(7)[0])"
    done = subprocess.run(
        ["bash", "-c", 'ulimit -Sn 100; exec "$0" -c "$1"', sys.executable, code], cwd=ROOT, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert int(done.stdout.split()[-1]) == (65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536))


def test_a_store_is_read_whole(params, tmp_path, monkeypatch):
    """What newer code has written, what cannot be written, and who holds a lock; with its process."""
    monkeypatch.setattr(plan, "places", lambda root: SimpleNamespace(runs=tmp_path / "runs"))
    assert finding(doctor._store(params, tmp_path), "runs").detail == "0 trials, 0 ended; 0 scores, 0 studies"
    shutil.copytree(ROOT / "tests/golden/records/runs", tmp_path / "runs")
    assert finding(doctor._store(params, tmp_path), "runs").state == doctor.OK
    elsewhere = params.model_copy(
        update={"tracking": params.tracking.model_copy(update={"uri": "sqlite:///elsewhere.db"})}
    )
    for of_project, name in ((params, "mlflow.db"), (elsewhere, "elsewhere.db")):
        with held(tmp_path / "runs/.lock", "a sweep"), (tmp_path / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            checks = [*doctor._store(of_project, tmp_path), *doctor._mlflow(of_project, tmp_path)]
            assert f"is held by a sweep, pid {os.getpid()} on" in finding(checks, "runs' lock").detail
            assert f"held by another process, pid {os.getpid()}" in finding(checks, "the MLflow store's lock").detail
    shutil.copytree(ROOT / "tests/golden/records/evaluations", tmp_path / "evaluations")
    assert finding(doctor._store(params, tmp_path), "runs").state == doctor.OK
    (metrics,), (score,) = (tmp_path / "runs").glob("*/metrics.jsonl"), (tmp_path / "evaluations").glob("*.json")
    for newer in (metrics, metrics.with_name("done.json"), score):
        before = newer.read_text()
        newer.write_text('{"schema": 99}\n')
        check = finding(doctor._store(params, tmp_path), "runs")
        assert check.state == doctor.MISSING and "schema 99 was written by newer code" in check.detail
        newer.write_text(before)
    monkeypatch.setattr(os, "access", lambda _path, _how: False)
    assert finding(doctor._store(params, tmp_path), "runs").detail == f"{tmp_path / 'runs'}: cannot be written"
