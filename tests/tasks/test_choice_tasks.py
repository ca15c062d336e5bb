"""SEED-Bench and MMMU-Pro: official layouts in, samples and draws out."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pipeline import tasks
from pipeline.core.errors import InputError
from pipeline.data.image_files import check_image, open_image
from pipeline.data.manifest import Manifest
from pipeline.scores.mmmu_pro import read_options
from pipeline.sweep.draw import draw_manifest
from pipeline.tasks.choice_files import letter_of
from pipeline.tasks.seed_bench import CLOSING
from tests.support.scoring import main
from tests.tasks.conftest import failure


def test_seed_bench_reads_images_and_leaves_out_videos(seed_bench):
    task = tasks.get("seed-bench")
    samples = list(task.read(seed_bench, "evaluation"))
    assert len(samples) == 20
    first = samples[1]
    assert first.question == "How many towels?\nA. a1\nB. b1\nC. c1\nD. d1\n" + CLOSING
    assert (first.sample_id, first.target, first.meta["dimension"]) == ("101670", "B", "Instances Counting")
    manifest = draw_manifest(task, seed_bench, seed=0, num_train=8, num_selection=4)
    assert manifest.sizes == {"train": 8, "selection": 4, "evaluation": 8}
    score = task.score(samples, {sample.sample_id: "b. because" for sample in samples})
    assert score.value == 50
    assert score.details["per_dimension"] == {"Instance Attributes": 0, "Instances Counting": 100}


def test_seed_bench_equals_the_command_on_its_result_file(seed_bench, tmp_path, capsys):
    task = tasks.get("seed-bench")
    samples = list(task.read(seed_bench, "evaluation"))
    predictions = {sample.sample_id: "ABC"[number % 3] for number, sample in enumerate(samples)}
    rows = [json.dumps({"question_id": key, "prediction": letter}) for key, letter in predictions.items()]
    (tmp_path / "results.jsonl").write_text("\n".join(rows))
    questions = str(seed_bench / "seed_bench" / "SEED-Bench.json")
    assert main(["seed-bench", "--results", str(tmp_path / "results.jsonl"), "--questions", questions]) == 0
    official, score = json.loads(capsys.readouterr().out), task.score(samples, predictions)
    assert score.value == pytest.approx(100 * official["accuracy"])
    assert score.details["per_dimension"] == pytest.approx(
        {name: 100 * share for name, share in official["per_dimension"].items()}
    )


def test_letters_are_read_from_the_beginning():
    answers = {"B": "B", " b": "B", "(C) two": "C", "D. four": "D", "A dog": "A", "Because": "", "two": "", "": ""}
    assert {text: letter_of(text) for text in answers} == answers


def test_seed_bench_errors_are_named(seed_bench):
    path = seed_bench / "seed_bench" / "SEED-Bench.json"
    content = json.loads(path.read_text())
    del content["questions"][4]["choice_c"]
    path.write_text(json.dumps(content))
    assert "record 4 of 'questions': field 'choice_c' is missing" in failure(seed_bench, "seed-bench")
    content["questions"][4] = content["questions"][3]
    path.write_text(json.dumps(content))
    assert "question_id 101672 stands twice" in failure(seed_bench, "seed-bench")
    content["questions"][3]["question_id"] = content["questions"][4]["question_id"] = "a\nb"
    path.write_text(json.dumps(content))
    assert "question_id 'a\\nb' stands twice" in failure(seed_bench, "seed-bench")


def test_mmmu_pro_reads_images_in_the_order_of_their_markers(mmmu, tmp_path):
    task = tasks.get("mmmu-pro")
    sample = next(task.read(mmmu, "evaluation"))
    assert sample.meta["choices"] == ["90", "it's", "<image 2>"]
    assert [image.path.rsplit("/", 1)[-1] for image in sample.images] == ["image_2", "image_1", "image_2"]
    colours = [open_image(mmmu / image.path).getpixel((0, 0))[0] for image in sample.images]
    assert colours == [1, 0, 1]
    manifest = draw_manifest(task, mmmu, seed=0, num_train=5, num_selection=2)
    assert manifest.sizes == {"train": 5, "selection": 2, "evaluation": 5}
    manifest.save(tmp_path / "m.json")
    Manifest.load(tmp_path / "m.json").verify_images()
    assert len({sample.images[0].sha256 for samples in manifest.splits.values() for sample in samples}) == 12


def test_mmmu_pro_equals_the_command_on_its_result_file(mmmu, tmp_path, capsys):
    task = tasks.get("mmmu-pro")
    samples = list(task.read(mmmu, "evaluation"))
    answers = ("C", "(A) or (C)", "no idea", "C.", "")
    predictions = {sample.sample_id: answers[number % 5] for number, sample in enumerate(samples)}
    rows = [
        {"id": s.sample_id, "options": str(s.meta["choices"]), "answer": s.target, "response": predictions[s.sample_id]}
        for s in samples
    ]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["mmmu-pro", "--results", str(tmp_path / "results.jsonl")]) == 0
    official, score = json.loads(capsys.readouterr().out), task.score(samples, predictions)
    assert [bool(one) for one in score.per_sample.values()] == [row["if_right"] for row in official["rows"]]
    assert score.value == pytest.approx(100 * official["overall"]["accuracy"])
    assert score.metrics == {"accuracy_of_readable": 100 * official["overall"]["accuracy_deterministic"]}
    assert score.details["n_random_fallback"] == official["overall"]["n_random_fallback"] == 4
    unreadable = task.score(samples, dict.fromkeys(predictions, "?"))
    assert unreadable.metrics == {} and unreadable.details["n_random_fallback"] == 12


def test_options_are_literals_and_never_run(tmp_path):
    assert read_options("[['A', 'B'], 'c']", "here") == ["['A', 'B']", "c"]
    mark = tmp_path / "ran"
    for text in (f"[open({str(mark)!r}, 'w')]", "'a'", "[]", "[", "{}"):
        with pytest.raises(InputError, match="here: field 'options' is not a list"):
            read_options(text, "here")
    assert not mark.exists()


def test_shards_that_are_damaged_or_incomplete_are_named(mmmu):
    shard = next((mmmu / "mmmu_pro" / "standard (10 options)").iterdir())
    absent = check_image(Path(f"{shard}#3/image_5"))
    assert "no image stands at this place" in (absent.problem or "")
    assert check_image(Path(f"{shard}#99/image_1")).problem is not None
    pyarrow.parquet.write_table(pyarrow.table({"id": ["a"]}), shard)
    assert "column 'question' is missing" in failure(mmmu, "mmmu-pro")
    shard.write_bytes(b"PAR1 cut short")
    assert "is no whole Parquet file" in failure(mmmu, "mmmu-pro")
    shard.unlink()
    assert "mmmu_pro/standard (10 options)/test-*.parquet" in failure(mmmu, "mmmu-pro")
