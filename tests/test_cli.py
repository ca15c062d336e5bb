"""The command line's promises: JSON alone on standard output, one line on standard error, exit status."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def hificl(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *args], capture_output=True, text=True, cwd=ROOT, check=False
    )


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
        (["no-such-command"], ["no-such-command"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(args, words):
    done = hificl(*args)
    assert done.returncode == 2 and done.stdout == ""
    line = done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in line


def test_help_lists_the_commands():
    done = hificl("--help")
    assert done.returncode == 0
    for command in ("sweep", "studies", "score", "params", "workspace", "pretrain", "bench", "ui"):
        assert command in done.stdout


def test_half_a_letter_of_a_result_file_is_printed_as_json_spells_it(tmp_path):
    row = {"question_id": "é\ud800", "prediction": "A", "gt_answer": "A"}
    (tmp_path / "results.jsonl").write_text(json.dumps(row))
    done = hificl("score", "seed-bench", "--results", str(tmp_path / "results.jsonl"))
    assert done.returncode == 0, done.stderr
    assert "é\\ud800" in done.stdout
    assert json.loads(done.stdout)["rows"][0]["question_id"] == row["question_id"]
