"""What the doctor says of the places around a project: Ray's folder, and a checkout that git refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.commands import doctor
from pipeline.config.load import load
from pipeline.train.memory import GIB, BackboneMemory, StepMemory
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
    of = BackboneMemory("big", "bf16", 15 * GIB, steps, {0: GIB})
    everywhere = doctor._memory(of, (24, 48, 80))
    assert everywhere.state == doctor.OK and everywhere.detail.endswith(
        "24 GiB: hificl with train.gradient_checkpointing alone; not lora, 48 GiB: lora with "
        "train.gradient_checkpointing alone, 80 GiB: all methods fit"
    )
    here = doctor._memory(of, (24,))
    assert here.state == doctor.NOTE and "train.gradient_checkpointing: true" in here.way_out
    assert doctor._memory(of, (80,)).state == doctor.OK
