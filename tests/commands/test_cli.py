"""The command line's promises: JSON alone on standard output, one line on standard error, exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from pipeline import backbones, methods, tasks
from pipeline.cli import command_line, main
from tests.conftest import ROOT


def hificl(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *args], capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.fixture
def inside(capfd):
    """`inside(*args)` is what `hificl` does, in this process: for commands that import torch, of which one is run."""

    def run(*args: str) -> subprocess.CompletedProcess:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(args))
        return subprocess.CompletedProcess(args, int(ended.value.code or 0), *capfd.readouterr())

    return run


def test_parameters_are_counted_on_the_real_configuration():
    done = hificl("params", "--backbone", "idefics2-8b-base", "--method", "hificl", "--set", "rank=4")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trainable"] == 32 * 32 * 2 * 4 * (8 + 128)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["params", "--backbone", "idefics2", "--method", "hificl"],
            ["unknown backbone 'idefics2'", "idefics2-8b-base"],
        ),
        (["params", "--backbone", "idefics2-8b-base", "--method", "hificl", "--set", "rnak=4"], ["rnak", "rank"]),
        (["bench", "subsampel"], ["unknown benchmark", "Known"]),
        (["sweep", "--set", "train.epoch=2"], ["train", "epoch", "epochs"]),
        (["studdy"], ["unknown command 'studdy'", "Did you mean 'study'", "hificl --help"]),
        (["score", "captoin"], ["captoin", "Did you mean 'caption'"]),
        (["completion", "tcsh"], ["unknown shell 'tcsh'", "Did you mean 'zsh'"]),
        (["submit", "slrum"], ["unknown system 'slrum'", "Did you mean 'slurm'"]),
        (["sweep", "--stdy", "x"], ["--stdy", "Did you mean '--study'", "hificl sweep --help"]),
        (["--verison"], ["--verison", "Did you mean '--version'"]),
        (["bench", "step", "--device=gpu"], ["--device", "'gpu'", "cpu, cuda"]),
        (["where", "there"], ["unknown argument 'there'"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(args, words, inside):
    done = (inside if args[0] == "params" else hificl)(*args)
    assert done.returncode == 2 and done.stdout == ""
    line = done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in line


def test_help_lists_every_command_once_in_a_line_of_its_group():
    done = hificl("--help")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    verbs = command_line()._subparsers._group_actions[0].choices
    for verb in verbs:
        assert len([line for line in lines if line.startswith(f"  {verb} ")]) == 1, verb
    for group in ("run:", "look:", "check:", "names:", "numbers:", "miniature:", "cluster:", "by hand:", "options:"):
        assert group in lines
    assert {"sweep", "studies", "score", "params", "workspace", "pretrain", "bench", "ui"} <= verbs.keys()


def test_the_version_is_said_with_its_commit():
    done = hificl("--version")
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    assert done.returncode == 0
    assert done.stdout.startswith(f"hificl-lab {version('hificl-lab')}, commit {head}")


@pytest.mark.parametrize(
    ("kind", "registry", "one"),
    [
        ("methods", methods, {"name": "lora", "trained": True}),
        ("backbones", backbones, {"name": "mini-llava", "class": "LlavaForConditionalGeneration"}),
        ("tasks", tasks, {"name": "mini-vqa", "metric": "accuracy", "stands_for": "vqav2"}),
    ],
)
def test_all_that_can_be_named_is_listed(kind, registry, one, inside):
    rows = json.loads((hificl if kind == "tasks" else inside)(kind).stdout)
    named = [row["name"] for row in rows if row["name"]]  # classes of which any checkpoint can be named have none
    assert named == registry.names()
    assert one.items() <= next(row for row in rows if row["name"] == one["name"]).items()


def test_half_a_letter_of_a_result_file_is_printed_as_json_spells_it(tmp_path):
    row = {"question_id": "é\ud800", "prediction": "A", "gt_answer": "A"}
    (tmp_path / "results.jsonl").write_text(json.dumps(row))
    done = hificl("score", "seed-bench", "--results", str(tmp_path / "results.jsonl"))
    assert done.returncode == 0, done.stderr
    assert "é\\ud800" in done.stdout
    assert json.loads(done.stdout)["rows"][0]["question_id"] == row["question_id"]
