"""What the doctor says of the places around a project: Ray's folder, and a checkout that git refuses."""

from __future__ import annotations

import pytest

from pipeline.commands import doctor
from pipeline.config.load import load
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
