"""DVC's experiments as a user runs them: in a Git clone, in the workspace, in copies and from the queue."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

pytestmark = [pytest.mark.experiments, pytest.mark.e2e, pytest.mark.timeout(1800)]

OF_THE_PROJECT = (
    ".dvc/config", ".dvc/.gitignore", ".dvc/page.html", ".dvc/plots", ".dvcignore", ".gitignore", "checkpoints",
    "dvc.lock", "dvc.yaml", "params.yaml", "pipeline", "stages",
)  # fmt: skip
TINY = {  # the miniature's files as if they were official ones
    "backbones": ["mini-idefics2"], "tasks": ["mini-vqa"], "studies": ["small"], "data_root": "data/real",
    "sources": {"mini-idefics2": {"weights": "checkpoints/mini-idefics2"}},
    "methods": {"hificl": {"learning_rate": 0.03}},
    "subsample": {"num_train": 64, "num_selection": 16, "num_evaluation": 60},
    "train": {"num_train_samples": 64, "num_selection_samples": 16, "num_shots": 2, "epochs": 1, "precision": "fp32"},
    "evaluate": {"generation": {"batch_size": 60}},
}  # fmt: skip
STUDY = {
    "title": "A small study", "backbones": ["idefics2-8b-base"], "tasks": ["vqav2"],
    "methods": {"zero-shot": None, "hificl": None},
}  # fmt: skip
COLUMNS = 100


class Clone:
    """A Git clone of the project with a small profile, and the commands that its user gives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join(["/usr/bin", os.environ["PATH"]])  # the environment is not activated
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")},
            "PATH": path, "COLUMNS": str(COLUMNS), "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1",
            **dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"), "a user"),
            **dict.fromkeys(("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "user@example.org"),
        }  # fmt: skip

    def run(self, *words: str) -> str:
        """Run a command; return what it printed."""
        done = subprocess.run(
            words, cwd=self.folder, capture_output=True, text=True, timeout=900, check=False, env=self.environment
        )
        if done.returncode:
            pytest.fail(
                f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
            )
        return done.stdout

    def git(self, *words: str) -> str:
        return self.run("git", *words)

    def dvc(self, *words: str) -> str:
        return self.run(sys.executable, "-m", "dvc", *words)

    def json(self, *words: str):
        return json.loads(self.dvc(*words, "--json"))

    def trials(self) -> set[str]:
        return {path.parent.name for path in (self.folder / "runs").glob("*/done.json")}

    def rates(self) -> list[float]:
        """The learning rates of the trained trials."""
        configs = (json.loads(path.read_text())["config"] for path in (self.folder / "runs").glob("*/config.json"))
        return sorted(config["learning_rate"] for config in configs if config["method"] == "hificl")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Clone:
    return make_clone(tmp_path_factory.mktemp("experiments") / "clone")


def make_clone(folder: Path) -> Clone:
    """A clone whose pipeline has run once."""
    for name in OF_THE_PROJECT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    for kind, name, content in (("profiles", "tiny", TINY), ("studies", "small", STUDY)):
        (folder / kind).mkdir()
        (folder / kind / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    params = (folder / "params.yaml").read_text()
    for field, value in (
        ("profile", "tiny"),
        ("num_train_images", "100"),
        ("num_val_images", "60"),
        ("system_metrics", "false"),
    ):
        params, count = re.subn(rf"(?m)^(\s*{field}:) *\S*", rf"\1 {value}", params)
        assert count == 1, field
    (folder / "params.yaml").write_text(params)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    made = Clone(folder)
    made.git("init", "-q", "-b", "main")
    made.dvc("commit", "-f", "-q", "backbone")  # as they are: an edit of the miniature's code would train them anew
    made.dvc("repro", "-q", "world")
    shutil.copytree(folder / "data/miniature", folder / "data/real", dirs_exist_ok=True)
    made.dvc("repro", "-q")
    made.git("add", "-A")
    made.git("commit", "-q", "-m", "the first run")
    return made


def test_a_value_set_by_dvc_changes_its_line_and_trains_what_is_new(clone: Clone) -> None:
    before = clone.trials()
    clone.dvc("exp", "run", "-q", "-n", "slower", "-S", "train.learning_rate=0.00002")
    changed = [line for line in clone.git("diff", "-U0", "params.yaml").splitlines() if line[:1] in "+-"]
    assert [line.split("#")[0].split() for line in changed[2:]] == [
        ["-", "learning_rate:"],
        ["+", "learning_rate:", "2e-05"],
    ]
    assert len(clone.trials() - before) == 1 and clone.rates()[0] == 2e-5


def test_a_run_adds_few_lines_to_what_git_holds(clone: Clone) -> None:
    changed = {line.split()[-1]: line.split()[:2] for line in clone.git("diff", "--numstat").splitlines()}
    assert set(changed) <= {"dvc.lock", "metrics.json", "params.yaml", "scores.csv"}
    assert all(int(lines) < 40 for pair in changed.values() for lines in pair)
    assert (clone.folder / "dvc.lock").read_text().count("\n") < 500
    assert not clone.git("status", "--porcelain", "--untracked-files=all").count("??")


def test_a_copy_finds_its_projects_trials_and_scores(clone: Clone) -> None:
    before, scored = clone.trials(), set((clone.folder / "evaluations").glob("*.json"))
    clone.git("checkout", "-q", ".")
    said = clone.dvc("exp", "run", "--temp", "-n", "same", "-S", "train.learning_rate=0.03")  # the profile's own
    assert re.findall("Running stage '(.*)'", said) == ["official", "train", "evaluate", "report"]
    assert clone.trials() == before and set((clone.folder / "evaluations").glob("*.json")) == scored
    assert not clone.git("status", "--porcelain")


def test_the_queue_runs_experiments_side_by_side_into_the_projects_store(clone: Clone) -> None:
    before, scored = clone.trials(), set((clone.folder / "evaluations").glob("*.json"))
    clone.dvc("exp", "run", "-q", "--queue", "-n", "pair", "-S", "train.learning_rate=0.05,0.00002")
    clone.environment["PATH"] = os.pathsep.join([str(clone.folder / ".venv/bin"), clone.environment["PATH"]])
    # it starts `dvc` by name; a pipe to its workers would be waited for
    words = [sys.executable, "-m", "dvc", "queue", "start", "-q", "--jobs", "2"]
    subprocess.run(words, cwd=clone.folder, env=clone.environment, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)  # fmt: skip
    deadline, states = time.monotonic() + 900, [""]
    while time.monotonic() < deadline and not set(states) <= {"Success", "Failed"}:
        time.sleep(2)
        lines = clone.dvc("queue", "status").splitlines()[1:3]
        states = [line.split()[-1] for line in lines]
    logs = [clone.dvc("queue", "logs", line.split()[0]) for line in lines]
    assert states == ["Success", "Success"], "\n".join(log[-3000:] for log in logs)
    assert len(clone.trials() - before) == 1 and 0.05 in clone.rates()  # the other is trained already
    assert len(set((clone.folder / "evaluations").glob("*.json")) - scored) == 1
    with sqlite3.connect(f"file:{clone.folder / 'mlflow.db'}?mode=ro", uri=True) as database:
        query = "select count(*) from params where key = 'learning_rate' and value = '0.05'"
        assert database.execute(query).fetchone() == (1,)
        assert database.execute("select count(*) from runs where status = 'RUNNING'").fetchone() == (0,)
    assert not clone.git("status", "--porcelain")


def test_experiments_are_shown_with_their_scores_first(clone: Clone) -> None:
    shown = clone.dvc("exp", "show", "--only-changed").splitlines()
    (head,) = (line for line in shown if "Experiment" in line)
    assert "mini-vqa" in head[:COLUMNS] and "train.learning_rate" in head[:COLUMNS]
    rows = {name: next(line for line in shown if f"[{name}]" in line) for name in ("slower", "pair-1")}
    assert "2e-05" in rows["slower"][:COLUMNS] and "0.05" in rows["pair-1"][:COLUMNS]
    assert not any("!" in row for row in rows.values())
    found = {exp["name"]: exp for base in clone.json("exp", "show") for exp in _revisions(base) if exp.get("name")}
    assert len(found) >= 5 and all(
        exp["data"]["metrics"]["metrics.json"]["data"]["mini-vqa"] >= 0 for exp in found.values()
    )


def test_metrics_and_params_are_compared_with_the_commit_and_with_each_other(clone: Clone) -> None:
    clone.dvc("exp", "apply", "-q", "pair-1")
    for revisions in (("HEAD", "workspace"), ("slower", "pair-1")):
        between = () if "HEAD" in revisions else revisions
        text = clone.dvc("metrics", "diff", "--all", *between)
        assert "mini-vqa" in text and _narrow(text)
        text = clone.dvc("params", "diff", *between)
        assert re.search(r"train\.learning_rate +(-|2e-05) +0\.05", text) and _narrow(text)
        text = clone.dvc("metrics", "diff", "--all", *between, "--targets", "reports/metrics/small.json")
        assert {"mini-vqa.accuracy.zero-shot", "mini-vqa.accuracy.hificl"} <= set(text.split()) and _narrow(text)
    assert re.search(r"mini-vqa\n.* \d", clone.dvc("metrics", "show"))


def test_an_applied_experiment_is_not_trained_again(clone: Clone) -> None:
    before = clone.trials()
    clone.dvc("repro", "-q")
    assert clone.trials() == before
    assert clone.json("metrics", "diff", "pair-1") == {}


def test_plots_need_no_network_and_have_both_revisions(clone: Clone) -> None:
    clone.dvc("plots", "show", "-q")
    page = clone.folder / "dvc_plots/index.html"
    assert "workspace" in page.read_text()
    clone.dvc("plots", "diff", "slower", "pair-1")
    text = page.read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", text)
    pictures = re.findall(r'<img src="([^"]+)"', text)
    assert len(pictures) >= 2 and all((page.parent / name).is_file() for name in pictures)
    shown = clone.json("plots", "diff", "slower", "pair-1")["data"]
    rows = shown["scores.csv"][0]["content"]["data"]["values"]
    assert {(row["rev"], row["method"]) for row in rows} == {
        (revision, method) for revision in ("slower", "pair-1") for method in ("zero-shot", "hificl")
    }
    assert any(name.startswith("reports/figures/small/") for name in shown)


def _revisions(base):
    yield base
    for experiment in base.get("experiments") or ():
        yield from experiment["revs"]


def _narrow(text: str) -> bool:
    return all(len(line) <= COLUMNS for line in text.splitlines())
