"""Flickr30k, MME, SEED-Bench and MMMU-Pro: official layouts in, samples and draws out."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from pipeline import tasks
from pipeline.data.images import check_image, open_image
from pipeline.data.manifest import Manifest
from pipeline.data.subsample import draw
from pipeline.errors import InputError
from pipeline.scores.__main__ import main
from pipeline.scores.mmmu_pro import read_options
from pipeline.tasks.choice_files import letter_of
from pipeline.tasks.mme import COGNITION, PERCEPTION
from pipeline.tasks.seed_bench import CLOSING


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (number % 256, number // 256, 7)).save(buffer, format="PNG")
    return buffer.getvalue()


def failure(root: Path, name: str, split: str = "evaluation") -> str:
    with pytest.raises(InputError) as caught:
        list(tasks.get(name).read(root, split))
    return str(caught.value)


# Flickr30k -----------------------------------------------------------------------------------------------


@pytest.fixture
def flickr(tmp_path: Path) -> Path:
    images = tmp_path / "flickr30k" / "flickr30k-images"
    images.mkdir(parents=True)
    records = []
    for number in range(30):
        name = f"{1_000_092_795 + number}.jpg"
        (images / name).write_bytes(png(number))
        sentences = [{"raw": f"Two guys , view {n} \n", "tokens": [], "imgid": number, "sentid": n} for n in range(5)]
        split = ("train", "test", "val")[number % 3]
        records.append({"filename": name, "imgid": number, "split": split, "sentences": sentences, "sentids": []})
    content = {"images": records, "dataset": "flickr30k"}
    (tmp_path / "flickr30k" / "dataset_flickr30k.json").write_text(json.dumps(content))
    return tmp_path


def test_flickr_uses_karpathys_train_and_test(flickr):
    task = tasks.get("flickr30k")
    test = list(task.read(flickr, "evaluation"))
    assert [sample.sample_id for sample in test] == [1_000_092_795 + n for n in range(1, 30, 3)]
    assert test[0].target == "Two guys , view 0" and len(test[0].references) == 5
    manifest = draw(task, flickr, seed=0, num_train=6, num_selection=3)
    assert manifest.sizes == {"train": 6, "selection": 3, "evaluation": 10}
    assert manifest.image_path(manifest.splits["train"][0]).is_file()


def test_flickr_errors_are_named(flickr):
    path = flickr / "flickr30k" / "dataset_flickr30k.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "dataset": "flickr8k"}))
    assert "'dataset' is 'flickr8k'" in failure(flickr, "flickr30k")
    content["images"] = [record for record in content["images"] if record["split"] != "train"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="the train split is empty"):
        draw(tasks.get("flickr30k"), flickr, seed=0, num_train=1, num_selection=0)
    content["images"][0]["filename"] = "../x.jpg"
    path.write_text(json.dumps(content))
    assert "no plain file name" in failure(flickr, "flickr30k")


# MME -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mme(tmp_path: Path) -> Path:
    release = tmp_path / "mme" / "MME_Benchmark_release_version"
    number = 0
    for subtask in (*PERCEPTION, *COGNITION):
        texts = pictures = release / subtask
        if subtask in {"artwork", "posters"}:
            texts, pictures = release / subtask / "questions_answers_YN", release / subtask / "images"
        texts.mkdir(parents=True)
        pictures.mkdir(exist_ok=True)
        for image in range(4):
            number += 1
            suffix = ".png" if subtask in COGNITION else ".jpg"
            (pictures / f"{image:04d}{suffix}").write_bytes(png(number))
            questions = f"Is it é{image}? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n\n"
            (texts / f"{image:04d}.txt").write_text(questions, encoding="utf-8")
    return tmp_path


def test_mme_reads_both_layouts_and_keeps_pairs_together(mme):
    task = tasks.get("mme")
    samples = list(task.read(mme, "evaluation"))
    assert len(samples) == 14 * 4 * 2 == len({sample.sample_id for sample in samples})
    assert samples[0].sample_id == "existence/0000.jpg#0"
    assert [sample.target for sample in samples[:2]] == ["Yes", "No"]
    assert samples[0].question == "Is it é0? Please answer yes or no."
    manifest = draw(task, mme, seed=0, num_train=20, num_selection=10)
    assert manifest.sizes == {"train": 20, "selection": 10, "evaluation": 82}
    for part in manifest.splits.values():
        names = {sample.images[0].path for sample in part}
        assert len(part) == 2 * len(names)
    assert draw(task, mme, seed=0, num_train=20, num_selection=10, num_evaluation=6).sizes["evaluation"] == 6
    with pytest.raises(InputError, match="no image may be in two splits"):
        draw(task, mme, seed=0, num_train=112, num_selection=0)


def test_mme_is_scored_by_accuracy_and_by_pairs(mme):
    task = tasks.get("mme")
    samples = list(task.read(mme, "evaluation"))
    right = {sample.sample_id: f"{sample.target.lower()}, it is" for sample in samples}
    perfect = task.score(samples, right)
    assert perfect.value == 100
    assert perfect.metrics == {"accuracy_plus": 100, "perception": 2000, "cognition": 800}
    always_yes = task.score(samples, dict.fromkeys(right, "Yes"))
    assert always_yes.value == 50
    assert always_yes.metrics == {"accuracy_plus": 0, "perception": 500, "cognition": 200}
    cut = task.score(samples[:3], right)  # the second image lost its second question
    assert (cut.value, cut.metrics["accuracy_plus"]) == (100, 100)


def test_mme_equals_the_command_on_its_result_files(mme, tmp_path, capsys):
    task = tasks.get("mme")
    samples = list(task.read(mme, "evaluation"))
    answers = ("Yes", "no", "No, it is not", "perhaps", "yes\tand", "not sure", "Yes.")
    predictions = {sample.sample_id: answers[number % 7] for number, sample in enumerate(samples)}
    lines: dict[str, list[str]] = {}
    for sample in samples:
        columns = (sample.meta["image"], sample.question, sample.target, predictions[sample.sample_id])
        lines.setdefault(sample.meta["category"], []).append("\t".join(map(str, columns)))
    (tmp_path / "results").mkdir()
    for subtask, rows in lines.items():
        (tmp_path / "results" / f"{subtask}.txt").write_text("\n".join(rows), encoding="utf-8")
    assert main(["mme", "--results", str(tmp_path / "results")]) == 0
    official, score = json.loads(capsys.readouterr().out), task.score(samples, predictions)
    assert score.details["per_category"] == official["accuracy"]
    assert score.details["accuracy_plus_per_category"] == official["accuracy_plus"]
    assert score.metrics["perception"] == official["Perception"]["total"]
    assert score.metrics["cognition"] == official["Cognition"]["total"]


def test_mme_from_shards_equals_mme_from_folders(mme, tmp_path_factory):
    task, root = tasks.get("mme"), tmp_path_factory.mktemp("shards")
    folders = list(task.read(mme, "evaluation"))
    (root / "mme" / "data").mkdir(parents=True)
    records = [
        {
            "question_id": f"{sample.meta['category']}/{sample.meta['image']}",
            "image": {"bytes": (mme / sample.images[0].path).read_bytes(), "path": None},
            "question": sample.question,
            "answer": sample.target,
            "category": sample.meta["category"],
        }
        for sample in folders
    ]
    for shard in range(2):
        table = pyarrow.Table.from_pylist(records[56 * shard : 56 * (shard + 1)])
        pyarrow.parquet.write_table(table, root / f"mme/data/test-{shard:05d}-of-00002-ab.parquet", row_group_size=10)
    shards = list(task.read(root, "evaluation"))
    for one, other in zip(folders, shards, strict=True):
        assert (one.sample_id, one.question, one.target) == (other.sample_id, other.question, other.target)
        assert open_image(root / other.images[0].path).tobytes() == open_image(mme / one.images[0].path).tobytes()
    drawn = [
        [sample.sample_id for sample in draw(task, place, seed=2, num_train=20, num_selection=10).splits["train"]]
        for place in (mme, root)
    ]
    assert drawn[0] == drawn[1]


def test_mme_errors_are_named(mme):
    text = mme / "mme" / "MME_Benchmark_release_version" / "OCR" / "0002.txt"
    text.write_text("One question\tYes\n")
    assert "OCR/0002.txt: has 1 lines" in failure(mme, "mme")
    text.write_text("One\tYes\nTwo\tPerhaps\n")
    assert "0002.txt: line 2: the answer is 'Perhaps'" in failure(mme, "mme")
    text.write_text("One\tYes\nTwo\tNo\n")
    text.with_suffix(".jpg").unlink()
    with pytest.raises(InputError, match=r"1 image is missing or cannot be read:\n .*OCR/0002\.jpg: .*does not exist"):
        draw(tasks.get("mme"), mme, seed=0, num_train=10, num_selection=0)
    for picture in text.parent.iterdir():
        picture.unlink()
    text.parent.rmdir()
    assert "'OCR' was not found" in failure(mme, "mme")


# SEED-Bench ----------------------------------------------------------------------------------------------


@pytest.fixture
def seed_bench(tmp_path: Path) -> Path:
    images = tmp_path / "seed_bench" / "SEED-Bench-image"
    images.mkdir(parents=True)
    questions = []
    for number in range(20):
        (images / f"1454426_{number}").write_bytes(png(number))
        questions.append(
            {
                "answer": " B" if number % 2 else "A",
                **{f"choice_{letter}": f"{letter}{number}" for letter in "abcd"},
                "data_id": f"1454426_{number}",
                "data_type": "image",
                "question": "How many towels?",
                "question_id": str(101_669 + number),
                "question_type_id": 5 if number % 2 else 3,
            }
        )
    video = {"data_id": "94328.webm", "data_type": "video", "question_id": "v1738", "question_type_id": 10}
    questions.append({**video, "answer": "C"})
    names = {"Instance Attributes": 3, "Instances Counting": 5}
    (images.parent / "SEED-Bench.json").write_text(json.dumps({"questions": questions, "question_type": names}))
    return tmp_path


def test_seed_bench_reads_images_and_leaves_out_videos(seed_bench):
    task = tasks.get("seed-bench")
    samples = list(task.read(seed_bench, "evaluation"))
    assert len(samples) == 20
    first = samples[1]
    assert first.question == "How many towels?\nA. a1\nB. b1\nC. c1\nD. d1\n" + CLOSING
    assert (first.sample_id, first.target, first.meta["dimension"]) == ("101670", "B", "Instances Counting")
    manifest = draw(task, seed_bench, seed=0, num_train=8, num_selection=4)
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


# MMMU-Pro ------------------------------------------------------------------------------------------------


@pytest.fixture
def mmmu(tmp_path: Path) -> Path:
    folder = tmp_path / "mmmu_pro" / "standard (10 options)"
    folder.mkdir(parents=True)
    empty = {f"image_{n}": None for n in range(1, 8)}
    records = [
        {
            "id": f"test_Biology_{number}",
            "question": "Which <image 2> follows <image 1>?",
            "options": "['90', \"it's\", '<image 2>']",
            "answer": "C",
            "subject": "Biology",
            "topic_difficulty": "Easy",
            **empty,
            "image_1": {"bytes": png(3 * number), "path": "a.png"},
            "image_2": {"bytes": png(3 * number + 1), "path": None},
        }
        for number in range(12)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "test-00000-of-00001.parquet")
    return tmp_path


def test_mmmu_pro_reads_images_in_the_order_of_their_markers(mmmu, tmp_path):
    task = tasks.get("mmmu-pro")
    sample = next(task.read(mmmu, "evaluation"))
    assert sample.meta["choices"] == ["90", "it's", "<image 2>"]
    assert [image.path.rsplit("/", 1)[-1] for image in sample.images] == ["image_2", "image_1", "image_2"]
    colours = [open_image(mmmu / image.path).getpixel((0, 0))[0] for image in sample.images]
    assert colours == [1, 0, 1]
    manifest = draw(task, mmmu, seed=0, num_train=5, num_selection=2)
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
    assert "does not exist" in (absent.problem or "")
    assert check_image(Path(f"{shard}#99/image_1")).problem is not None
    pyarrow.parquet.write_table(pyarrow.table({"id": ["a"]}), shard)
    assert "column 'question' is missing" in failure(mmmu, "mmmu-pro")
    shard.write_bytes(b"PAR1 cut short")
    assert "is no whole Parquet file" in failure(mmmu, "mmmu-pro")
    shard.unlink()
    assert "mmmu_pro/standard (10 options)/test-*.parquet" in failure(mmmu, "mmmu-pro")
