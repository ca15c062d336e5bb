"""One's own file and a backbone's name to a table and an adapter: the commands of docs/quickstart.md, end to end."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import pytest
import yaml
from PIL import Image

from pipeline.adapters import read_config
from pipeline.cli import INTERRUPTED, main
from pipeline.config.schema import TaskFile
from pipeline.core.errors import InputError
from pipeline.miniature.world import write_world
from pipeline.records import as_written
from pipeline.sweep.draw import draw_manifest
from pipeline.tasks import tasks
from pipeline.tasks.file_rows import completed
from pipeline.tasks.file_task import FileTask
from pipeline.workspace.adapt import PLAN, Asked, Budget, LaidOut, Seconds, _kept, _rows, budget
from tests.conftest import ROOT
from tests.e2e.conftest import environment
from tests.support.tiny_hub import make

HEADING = "## Your data in five minutes"
COMMAND = re.compile(r"^(?:hificl|cd|dvc) .*", re.MULTILINE)


def write_own(folder: Path, count: int = 60) -> Path:
    """Write the miniature's world as a file of JSON lines, pictures beside it."""
    write_world(folder, num_train_images=count, num_val_images=10)
    questions, annotations = (
        json.loads(next(folder.rglob(f"v2_*train2014_{name}.json")).read_text())[name]
        for name in ("questions", "annotations")
    )
    answers = {record["question_id"]: [given["answer"] for given in record["answers"]] for record in annotations}
    rows = [
        {
            "image": f"train2014/COCO_train2014_{record['image_id']:012d}.png", "question": record["question"],
            "answers": answers[record["question_id"]],
        }
        for record in questions
    ]  # fmt: skip
    path = folder / "pets.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shown() -> list[str]:
    """Return the commands that the page shows."""
    section = (ROOT / "docs/quickstart.md").read_text().partition(HEADING)[2].partition("\n## ")[0]
    return COMMAND.findall("\n".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL)))


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    program = {"hificl": ["-m", "pipeline"], "dvc": ["-m", "dvc"]}[words[0]]
    command = [sys.executable, *program, *words[1:]]
    path = {**environment(), "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, env=path, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_what_the_page_shows(tmp_path: Path, monkeypatch, capsys) -> None:
    data, out = write_own(tmp_path / "world"), tmp_path / "out"
    adapt, ask, into, again = shown()
    names = {"pets.jsonl": str(data), "work/pets": str(out), "photo.png": str(next(data.parent.rglob("*.png")))}
    names |= {"--minutes 5": "--minutes 0.05 --methods hificl", "'Is it a cat?'": "'Which colour?'"}

    def words(command: str) -> list[str]:
        for before, after in names.items():
            command = command.replace(before, after)
        return shlex.split(command)

    done = run(words(adapt), ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads(done.stdout)
    rows = {row["method"]: row for row in record["rows"]}
    assert list(rows) == ["zero-shot", "icl-4", "hificl"] and record["best"] == "hificl"
    for row in rows.values():
        assert row["metric"] == "accuracy" and row["interval"][0] <= row["value"] <= row["interval"][1]
    assert rows["hificl"]["adapter"] and rows["zero-shot"]["adapter"] is None
    assert "guessed: answers = column 'answers'" in done.stderr and "guessed: score = vqa" in done.stderr
    events = [json.loads(line) for line in (out / "runs/journal.jsonl").read_text().splitlines()]
    timing, *search = (event["pids"] for event in events if event["event"] == "slot built")
    assert timing in search  # the process that was timed holds the backbone, and goes on
    page = (out / "reports/index.html").read_text()
    assert "pets on mini-idefics2" in page and not re.search(r"papers?'|measured again|stands for", page)
    assert not (out / "reports/findings.md").exists()
    definition = json.loads((out / "data/manifests/pets/manifest.json").read_text())["definition"]
    assert read_config(out / "adapter").extra["definition"] == definition
    watched = yaml.safe_load((out / "dvc.yaml").read_text())["stages"]["subsample"]["deps"]
    assert {str(data), str(data.parent / "train2014")} <= set(watched)

    answer = run(words(ask), tmp_path)  # from anywhere: the adapter knows its own project
    assert answer.returncode == 0 and json.loads(answer.stdout)["answer"], answer.stderr[-2000:]
    assert shlex.split(record["ask"])[:4] == words(ask)[:4] and Path(shlex.split(record["ask"])[5]).is_file()

    before = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*/done.json")}
    assert words(into) == ["cd", str(out)]
    repeated = run(words(again), out)
    assert repeated.returncode == 0, repeated.stderr[-4000:]
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*/done.json")} == before
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        main(words(adapt)[1:])
    assert ended.value.code == 0 and json.loads(capsys.readouterr().out) == record  # nothing is left to do
    with pytest.raises(SystemExit) as ended:
        main([*words(adapt)[1:], "--seed", "1"])
    assert ended.value.code == 2 and "was made with another seed" in capsys.readouterr().err


def test_minutes_pay_for_the_same_for_each_method() -> None:
    seconds, rows = Seconds({"hificl": 0.02, "mimic": 0.05}, score=0.01), dict.fromkeys(("train", "selection"), 400)
    rows["evaluation"] = 600
    long, short = (budget(seconds, minutes * 60, rows, slots=2, baselines=2) for minutes in (10, 1))
    assert long == Budget(points=4, epochs=5, train=400, selection=100, evaluation=600)
    for given, minutes in ((long, 10), (short, 1)):
        per_epoch = sum(given.train * each + given.selection * seconds.score for each in seconds.train.values())
        assert given.points * given.epochs * per_epoch / 2 <= 0.6 * minutes * 60
    least = budget(seconds, 0.1, rows, slots=1, baselines=2)
    assert least == Budget(points=1, epochs=1, train=16, selection=8, evaluation=20)


def test_what_an_earlier_call_laid_out_is_gone_on_with_or_refused_in_a_line(tmp_path: Path) -> None:
    asked, given = Asked("/own.jsonl", "mini-idefics2", ("lora",), 1.5, 0, {}), Budget(4, 5, 400, 100, 600)
    record = LaidOut(asked=as_written(asdict(asked)), budget=given)
    (tmp_path / PLAN).write_text(record.text())
    assert _kept(tmp_path, asked) == given
    with pytest.raises(InputError, match=r"adapt.json: was made with another minutes. Give another --out"):
        _kept(tmp_path, replace(asked, minutes=2.0))
    for text in ("{", "[]", '{"asked": []}', record.text().replace("400", '"all"')):
        (tmp_path / PLAN).write_text(text)
        with pytest.raises(InputError, match=r"adapt.json: .*Give another --out, or remove it"):
            _kept(tmp_path, asked)


@pytest.mark.parametrize("names", [None, ["train"] * 57 + ["test"] * 15, ["train"] * 41 + ["val"] * 13 + ["test"] * 18])
def test_the_sizes_that_are_asked_for_can_be_drawn(tmp_path: Path, names) -> None:
    """Rows of one picture stay together, and a picture that two splits name is lost to the later one."""
    rows = [{"image": f"{n // 6}.png", "question": f"{n}?", "answer": "cat"} for n in range(72)]
    for n in range(12):
        Image.new("RGB", (4, 4), (n, 0, 0)).save(tmp_path / f"{n}.png")
    if names:
        rows = [{**row, "split": name} for row, name in zip(rows, names, strict=True)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = FileTask.of("own", completed("own", TaskFile(file="own.jsonl"), tmp_path))
    sizes = _rows(task, tmp_path)
    manifest = draw_manifest(
        task, tmp_path, seed=0, num_train=sizes["train"], num_selection=sizes["selection"],
        num_evaluation=None if task.one_pool else sizes["evaluation"],
    )  # fmt: skip
    assert manifest.sizes["train"] == sizes["train"] and manifest.sizes["evaluation"] >= 15
    assert sum(manifest.sizes.values()) >= 60


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "no.jsonl"], "no.jsonl: no such file or folder"),
        (["--backbone", "mini-idefics"], "unknown backbone 'mini-idefics'. Did you mean 'mini-idefics2'"),
        (["--methods", "hificl,lorra"], "unknown method 'lorra'. Did you mean 'lora'"),
        (["--methods", "icl-k"], "--methods: 'icl-k' trains nothing"),
        (["--score", "bleu"], "the task: score: Input should be 'exact', 'vqa'"),
        (["--field", "question=quest"], "tasks.pets.fields.question: column 'quest' is not in"),
        (["--minutes", "0"], "--minutes: is 0"),
        (["--backbone", "folder:nowhere"], "nowhere: this folder with weights does not exist"),
        (["--split", "fold"], "'fold' is not there. Known: answer, question; or split: drawn (adapt: --split drawn)"),
        (["--score", "number"], "field 'answer' is \"cat\", which has no number; pets.jsonl line 2"),
        (["--score", "number"], "leave-out (adapt: --bad-rows leave-out), and they are counted and named"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_starts(tmp_path, monkeypatch, capsys, arguments, said) -> None:
    data = tmp_path / "pets.jsonl"
    data.write_text("".join(json.dumps({"question": f"{n}?", "answer": "cat"}) + "\n" for n in range(60)))
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["adapt", "--data", str(data), "--backbone", "mini-idefics2", "--out", str(out), *arguments])
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not out.exists()


def test_pictures_are_not_for_a_text_decoder(tmp_path: Path, monkeypatch, capsys) -> None:
    rows = [{"image": f"{n}.png", "question": f"{n}?", "answer": "cat"} for n in range(60)]
    for row in rows:
        Image.new("RGB", (4, 4)).save(tmp_path / row["image"])
    (tmp_path / "pets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(ROOT)
    words = ["adapt", "--data", str(tmp_path / "pets.jsonl"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--backbone", f"folder:{make('llama', tmp_path / 'text')}"])
    assert ended.value.code == 2 and not (tmp_path / "out").exists()
    assert "text: reads text alone, and the rows have pictures. Give a backbone that reads" in capsys.readouterr().err


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(900)
def test_text_alone_and_a_command_that_is_interrupted(tmp_path: Path) -> None:
    """Ctrl-C loses nothing that was done, and the same command goes on; how far it is stands in lines meanwhile."""
    rows = [{"input": f"the number behind {n}", "output": str(n + 1)} for n in range(72)]
    (tmp_path / "numbers.json").write_text(json.dumps(rows))
    weights, out = make("llama", tmp_path / "my-model"), tmp_path / "out"
    words = ["adapt", "--data", str(tmp_path / "numbers.json"), "--backbone", f"folder:{weights}", "--out", str(out)]
    words += ["--methods", "hificl", "--minutes", "0.1"]
    with (tmp_path / "said").open("w") as said:
        first = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *words], cwd=ROOT, env={**environment(), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL, stderr=said, start_new_session=True,
        )  # fmt: skip
        while first.poll() is None and not list(out.glob("runs/*/done.json")):  # the timing's
            time.sleep(0.2)
        os.killpg(first.pid, signal.SIGINT)
        assert first.wait(120) == INTERRUPTED
    told = (tmp_path / "said").read_text()
    for part in ("1 of 4, drawing samples", "2 of 4, timing hificl on 16 samples"):
        assert re.search(rf"^{part}: .*0\.1 (minutes left|were asked for)$", told, re.MULTILINE)
    assert "run the same command again to go on" in told and "Traceback" not in told
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/done.json")}
    done = run(["hificl", *words], ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert before and before.items() <= {path: path.stat().st_mtime_ns for path in out.glob("runs/*/done.json")}.items()
    record = json.loads(done.stdout)
    assert [row["method"] for row in record["rows"]] == ["zero-shot", "icl-4", "hificl"]
    assert all(row["value"] is not None for row in record["rows"]) and "--image" not in record["ask"]
    answer = run(shlex.split(record["ask"]), tmp_path)
    assert answer.returncode == 0 and isinstance(json.loads(answer.stdout)["answer"], str), answer.stderr[-2000:]


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(900)
def test_any_checkpoint_in_the_hubs_layout_on_real_pictures(tmp_path: Path, shared_data: Path) -> None:
    official, rows = tasks.get("vqav2"), []
    for sample in islice(official.read(shared_data, "train"), 48):
        answers = list(sample.references)
        rows.append({"image": sample.images[0].path, "question": sample.question, "answers": answers})
    (tmp_path / "data").mkdir()
    data = tmp_path / "data/real.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    weights, out = make("llava", tmp_path / "my-model"), tmp_path / "out"
    words = ["hificl", "adapt", "--data", str(data), "--images", str(shared_data), "--backbone", f"folder:{weights}"]
    done = run([*words, "--methods", "hificl", "--minutes", "0.05", "--out", str(out)], ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads(done.stdout)
    assert [row["method"] for row in record["rows"]] == ["zero-shot", "icl-4", "hificl"]
    assert all(row["value"] is not None for row in record["rows"])
    answer = run(shlex.split(record["ask"]), tmp_path)
    assert answer.returncode == 0 and isinstance(json.loads(answer.stdout)["answer"], str), answer.stderr[-2000:]
