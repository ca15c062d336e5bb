"""A study whose files go to a store of S3's kind (`rclone serve s3`, on loopback), from a folder without samples."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.e2e.conftest import make_project
from tests.support.free_port import free_port
from tests.tracking.test_models import LOAD, QUESTION

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(900)]
KEY, SECRET = "an-access-key", "a-secret-that-nothing-may-show"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder behind a bucket named `lab`; the environment says how to reach it."""
    folder, port = tmp_path / "objects/lab", free_port()
    folder.mkdir(parents=True)
    server = subprocess.Popen(
        [Path(sys.executable).with_name("rclone"), "serve", "s3", "--config", "/dev/null", "--auth-key",
         f"{KEY},{SECRET}", "--addr", f"127.0.0.1:{port}", str(folder.parent)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    try:
        _wait_for(port)
        yield folder
    finally:
        server.kill()
        server.wait()


def _wait_for(port: int) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail("the store of objects did not start")


def test_a_study_keeps_its_files_there_and_its_model_is_loaded_from_there(bucket, tmp_path):
    project = make_project(tmp_path / "project")

    def edit(raw):
        raw["tracking"]["artifacts"] = "s3://lab/runs"
        raw["studies"]["small"]["methods"] = {"hificl": {"set": {"rank": 2}}}

    project.change(edit)
    said = project.python("-m", "pipeline", "study", "small")
    kept = {path.name for path in bucket.rglob("*") if path.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json", "MLmodel"} <= kept
    assert not (project.folder / "mlartifacts").exists()

    uri = f"sqlite:///{project.folder / 'mlflow.db'}"
    name = "idefics2-8b-base_vqav2_hificl"
    version = MlflowClient(uri).get_model_version_by_alias(name, "best")
    assert version.source.startswith(("s3://lab/", "models:/"))
    image = sorted((project.folder / "data/real/images").rglob("*.jpg"))[0]
    rows = [{"image": base64.b64encode(image.read_bytes()).decode(), "question": QUESTION}]
    asked = [sys.executable, "-c", LOAD, uri, f"models:/{name}@best", json.dumps(rows)]
    done = subprocess.run(asked, cwd=project.folder, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.strip().splitlines()[-1])["answers"]
    assert len(answers) == 1

    traced = project.python("-m", "pipeline", "trace", "--all")
    for place, text in {"output": said.stdout + said.stderr, "trace": traced.stdout}.items():
        assert SECRET not in text, place
    for path in project.folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert SECRET.encode() not in path.read_bytes(), path
