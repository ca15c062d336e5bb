"""What all tests share: one torch thread, and the folder of real sample data where it is at hand."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

# as where the environment is active: dvc.yaml's `python` is this one
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # some hundred processes would compile the same files anew
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests give the same on a machine with a GPU
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when Ray is imported; pipeline.sweep may come after it

import pytest
from hypothesis import settings

settings.register_profile("shared", deadline=None)  # a busy machine is no fault of what is tested
settings.load_profile("shared")

# A suite that runs as a shell's background job (CI) has SIGINT ignored, and what it starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


# These take longest, and most of them share the project that has run once, so one worker has them all.
SHARING = (
    "tests/docs/", "tests/e2e/test_lineage.py", "tests/e2e/test_pipeline.py", "tests/tracking/test_models.py",
    "tests/tracking/test_ui.py",
)  # fmt: skip
LONG = ("tests/e2e/", "tests/bench/", "tests/security/test_local_sweep.py", "tests/pool/test_stopping.py")


def pytest_collection_modifyitems(config, items):
    """Under `pytest -n`, begin with what takes longest: begun last, it would keep one worker while the others idle."""
    if hasattr(config, "workerinput"):
        order = (SHARING, LONG, "")
        items.sort(key=lambda item: next(n for n, begin in enumerate(order) if item.nodeid.startswith(begin)))


def pytest_collection_finish():
    """Leave the million objects of what is imported by now out of garbage collections, each of which took 0.6 s."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under `pytest -n`, keep a file's tests with one worker, and so those of all files in `SHARING`."""
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # by the number of tests, which says nothing about how long they take

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::", 1)[0]
            return "the project" if path.startswith(SHARING) else path

    return ByFile(config, log)


@pytest.fixture
def metadata():
    """A stand-in of EC2's metadata service."""
    from tests.support.spot_metadata import SpotMetadata

    service = SpotMetadata()
    yield service
    service.close()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real COCO, VQAv2 and OK-VQA samples; the test is skipped where they are not at hand."""
    folder = Path(os.environ.get("HIFICL_SHARED_DATA", ROOT / "../shared/data")).resolve()
    if not (folder / "vqav2").is_dir():
        pytest.skip("no real sample data (HIFICL_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def tiny():
    """`tiny(name)` gives a loaded tiny variant, built once."""
    from functools import cache

    from pipeline import backbones

    return cache(lambda name: backbones.load(name, variant="tiny"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder with 0.png to 7.png, of several sizes; 7.png is grey."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i, (height, width) in enumerate([(56, 56), (56, 56), (56, 40), (40, 56), (30, 90), (56, 56), (64, 64)]):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    Image.fromarray(random.integers(0, 256, (50, 50), dtype=np.uint8)).save(folder / "7.png")
    return folder


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A small project whose whole pipeline has run once; tests that change its trials work on a copy (`copied`)."""
    from tests.e2e.conftest import make_project

    made = make_project(tmp_path_factory.mktemp("e2e") / "project")
    made.python("-m", "dvc", "repro")
    return made


@pytest.fixture(scope="session")
def small_world(tmp_path_factory) -> Path:
    """Manifests of mini-vqa and mini-coco with 24 training samples, of a small world of the miniature's."""
    from pipeline.miniature.world import write_world
    from pipeline.sweep.draw import draw_manifest
    from pipeline.tasks import tasks

    folder = tmp_path_factory.mktemp("small-world")
    write_world(folder / "data", num_train_images=60, num_val_images=12)
    for task in ("mini-vqa", "mini-coco"):
        manifest = draw_manifest(
            tasks.get(task), folder / "data", seed=0, num_train=24, num_selection=6, num_evaluation=4
        )
        manifest.save(folder / task / "manifest.json")
    return folder


@pytest.fixture(scope="session")
def trial(small_world):
    """`trial(method, folder, **fields)` gives the request of a short trial; options and fields of TrialConfig mixed."""
    from pipeline import backbones, methods
    from pipeline.config.load import BackboneSource, TrialRequest
    from pipeline.config.trial import TrialConfig
    from pipeline.data.manifest import Manifest

    backbone = "mini-idefics2"
    weights = str(ROOT / "checkpoints" / backbone)
    digest = backbones.digest_of(backbone, BackboneSource(weights=weights))
    manifests = {task: Manifest.load(small_world / task / "manifest.json").digest for task in ("mini-vqa", "mini-coco")}

    def make(method: str, folder: Path, task: str = "mini-vqa", **given):
        options = {name: given.pop(name) for name in list(given) if name in methods.option_names(method)}
        checked = methods.parse(method, options)
        facts = checked.facts()
        base = {
            "num_train_samples": 20, "epochs": 2, "learning_rate": facts.learning_rate, "weight_decay": 0.05,
            "warmup_ratio": 0.1, "gradient_clip": 1.0, "micro_batch_size": 2, "accumulation": 2, "engine": "torch",
            "num_selection_samples": 4, "num_shots": 2 if facts.is_shown else 0, "alignment_weight":
            facts.alignment_weight, "ground_truth_weight": facts.ground_truth_weight,
        }  # fmt: skip
        config = TrialConfig(
            backbone=backbone, backbone_digest=digest, task=task, manifest_digest=manifests[task], method=method,
            options=checked.plain(), **{**base, **given},
        )  # fmt: skip
        return TrialRequest(
            config=config, folder=str(folder / config.key), manifest=str(small_world / task / "manifest.json"),
            source=BackboneSource(weights=weights),
        )  # fmt: skip

    return make
