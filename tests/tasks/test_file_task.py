"""Tasks over files of one's own: columns guessed or named, rows that cannot be used, splits, scores, definitions."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from pipeline.config.load import load
from pipeline.config.schema import TaskFile
from pipeline.core import registry
from pipeline.core.errors import InputError
from pipeline.data.image_files import read_image
from pipeline.data.manifest import Manifest
from pipeline.data.parquet import cell_name
from pipeline.data.sample import Sample
from pipeline.sweep.draw import draw_manifest
from pipeline.tasks import of_manifest, tasks

ROWS = [
    {"id": f"q{n}", "image": f"{n // 2}.png", "question": f"What is {n}?", "answers": ["red"] * 6 + ["blue"] * 4}
    for n in range(24)
]


@pytest.fixture(autouse=True)
def _nothing_declared():
    yield
    registry.declare("task", {})


def pictures(folder: Path, count: int = 12) -> None:
    for n in range(count):
        Image.new("RGB", (8, 8), (n, 40, 90)).save(folder / f"{n}.png")


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def declared(root: Path, **settings):
    registry.declare("task", {"own": (TaskFile.model_validate(settings), root)})
    return tasks.get("own")


def drawn(task, root: Path, train: int = 8, selection: int = 4, evaluation: int | None = None) -> Manifest:
    sizes = {"num_train": train, "num_selection": selection, "num_evaluation": evaluation}
    return draw_manifest(task, root, seed=0, **sizes)


def test_a_file_needs_nothing_but_its_name(tmp_path: Path) -> None:
    pictures(tmp_path)
    write(tmp_path / "pets.jsonl", ROWS)
    task = declared(tmp_path, file="pets.jsonl")
    manifest = drawn(task, tmp_path)
    assert task.settings.score == "vqa" and task.settings.fields.answers == "answers"
    assert "guessed: answers = column 'answers'" in manifest.notes
    assert manifest.sizes == {"train": 8, "selection": 4, "evaluation": 12}
    images = [{image.path for sample in samples for image in sample.images} for samples in manifest.splits.values()]
    assert not images[0] & images[1] and not images[0] & images[2] and not images[1] & images[2]
    sample = manifest.splits["train"][0]
    assert sample.target == "red" and len(sample.references) == 10 and sample.question.startswith("What is ")
    assert sample.images[0].sha256 and task.template.query == "Image: {image} Question: {question} Answer:"
    answers = {sample.sample_id: "a red" for sample in manifest.splits["evaluation"]}
    assert task.score(manifest.splits["evaluation"], answers).value == pytest.approx(100.0)


def test_the_manifest_keeps_the_task_and_decides_by_it(tmp_path: Path) -> None:
    pictures(tmp_path)
    write(tmp_path / "pets.jsonl", ROWS)
    manifest = drawn(declared(tmp_path, file="pets.jsonl"), tmp_path)
    manifest.save(tmp_path / "manifest.json")
    registry.declare("task", {})  # as in a slot, which has read no params.yaml
    again = Manifest.load(tmp_path / "manifest.json")
    assert again.digest == manifest.digest and again.notes == manifest.notes
    assert of_manifest(again).template == of_manifest(manifest).template
    with pytest.raises(InputError, match="unknown task 'own'"):
        tasks.get("own")
    asked = drawn(declared(tmp_path, file="pets.jsonl", prompt="Q: {question} {image} A:"), tmp_path)
    assert asked.digest != manifest.digest and of_manifest(asked).template.query == "Q: {question} {image} A:"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", r"pets.jsonl line 25: is no JSON \(Expecting property name.*\): \{"),
        ({"id": "x", "image": "0.png", "answers": ["a"] * 4}, "line 25: field 'question' is missing"),
        (
            {"id": "x", "image": "0.png", "question": 1, "answers": ["a"]},
            r"has 1 answers; VQA.* \(adapt: --score exact\)",
        ),
        (
            {"id": "x", "image": "no.png", "question": "?", "answers": ["a"] * 4},
            "field 'image' is \"no.png\", which is no",
        ),
        (
            {"id": "x", "image": "../x.png", "question": "?", "answers": ["a"] * 4},
            "'image' is \"../x.png\", which lies out",
        ),
        (
            {"id": "q3", "image": "0.png", "question": "?", "answers": ["a"] * 4},
            "'id' is 'q3' again, as in line 4; .*--field id=#",
        ),
        ({"id": "x", "image": None, "question": "?", "answers": ["a"] * 4}, "field 'image' is null, an image's path"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, row, said) -> None:
    pictures(tmp_path)
    path = write(tmp_path / "pets.jsonl", ROWS)
    path.write_text(path.read_text() + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    with pytest.raises(
        InputError, match=f"1 of 25 row cannot be used: .*{said}.*bad_rows: leave-out .adapt: --bad-rows leave-out"
    ):
        drawn(declared(tmp_path, file="pets.jsonl"), tmp_path)
    manifest = drawn(declared(tmp_path, file="pets.jsonl", bad_rows="leave-out"), tmp_path)
    assert sum(manifest.sizes.values()) == 24
    assert any(note.startswith("1 of 25 rows are left out: pets.jsonl line 25") for note in manifest.notes)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"file": "../pets.jsonl"}, "tasks.own.file: '../pets.jsonl' lies outside the data root"),
        ({"file": "no.jsonl"}, "no.jsonl: no such file or folder"),
        ({"file": "0.png"}, "0.png: is a '.png'. Give .jsonl"),
        ({"fields": {"question": "quest"}}, "fields.question: column 'quest' is not in .*Did you mean 'question'"),
        ({"split": "fold"}, r"tasks.own.split: column 'fold' is not there.*; or split: drawn \(adapt: --split drawn\)"),
        ({"prompt": "{image} {animal} Answer:"}, r"tasks.own.prompt: \{animal\} is neither a field nor a column"),
        ({"prompt": "{image} {question}"}, "ends with no words of its own"),
        ({"prompt": "Q: {question} A:"}, r"it has no \{image\}, the rows have images"),
        (
            {"split": {"column": "id", "train": ["q1"], "evaluation": ["never"]}},
            r"no row has 'id' of the evaluation.*--split COLUMN",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path: Path, settings, said) -> None:
    pictures(tmp_path)
    write(tmp_path / "pets.jsonl", ROWS)
    with pytest.raises(InputError, match=said):
        drawn(declared(tmp_path, **{"file": "pets.jsonl", **settings}), tmp_path)


def test_a_column_says_which_split_a_row_is_of(tmp_path: Path) -> None:
    pictures(tmp_path)
    names = ["train"] * 14 + ["val"] * 4 + ["test"] * 6
    write(tmp_path / "pets.jsonl", [{**row, "split": name} for row, name in zip(ROWS, names, strict=True)])
    task = declared(tmp_path, file="pets.jsonl")
    manifest = drawn(task, tmp_path)
    for split, span in {"train": range(14), "selection": range(14, 18), "evaluation": range(18, 24)}.items():
        assert {int(sample.sample_id[1:]) for sample in manifest.splits[split]} <= set(span)
    assert manifest.sizes == {"train": 8, "selection": 4, "evaluation": 6}
    names = ["train"] * 17 + ["test"] * 7  # rows 17 and 18 have one picture
    write(tmp_path / "pets.jsonl", [{**row, "split": name} for row, name in zip(ROWS, names, strict=True)])
    manifest = drawn(declared(tmp_path, file="pets.jsonl"), tmp_path, 16, 0)
    assert manifest.notes[-1] == "1 rows of train share an image or a group with another split: passed over"
    assert "q16" not in {sample.sample_id for sample in manifest.splits["train"]}
    names = ["train"] * 14 + ["val"] * 4 + ["test"] * 6
    write(tmp_path / "pets.jsonl", [{**row, "split": name} for row, name in zip(ROWS, names, strict=True)])
    held_out = {"column": "split", "train": ["train", "val"], "evaluation": ["test"]}  # selection out of training
    manifest = drawn(declared(tmp_path, file="pets.jsonl", split=held_out), tmp_path)
    chosen = {sample.sample_id for name in ("train", "selection") for sample in manifest.splits[name]}
    assert len(chosen) == 12 and all(int(key[1:]) < 18 for key in chosen)


def test_no_group_is_in_two_splits(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "answer": "yes", "patient": n // 5} for n in range(50)]
    write(tmp_path / "rows.jsonl", rows)
    manifest = drawn(declared(tmp_path, file="rows.jsonl", fields={"group": "patient"}), tmp_path, 15, 10, 15)
    groups = [{(sample.sample_id - 1) // 5 for sample in samples} for samples in manifest.splits.values()]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert all(sample.images == () for samples in manifest.splits.values() for sample in samples)


def test_other_columns_stand_in_the_prompt(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [{"caption": f"a cat {n}", "question": "What?", "answer": "cat"} for n in range(9)])
    task = declared(tmp_path, file="rows.jsonl", prompt="Context: {caption}\nQ: {question}\nA:")
    sample = drawn(task, tmp_path, 3, 2).splits["train"][0]
    assert task.template.query.format(image="", question=sample.question) == (
        f"Context: a cat {sample.sample_id - 1}\nQ: What?\nA:"
    )
    assert task.template.stop_words == ("Context:", "Q:", "A:")


@pytest.mark.parametrize(
    ("row", "settings", "score", "target", "right", "wrong"),
    [
        ({"question": "?", "answer": "A Cat."}, {}, "exact", "A Cat.", "a cat", "cat"),
        ({"question": "?", "answer": "cat"}, {"score": "contains"}, "contains", "cat", "It is a cat", "catalogue"),
        ({"question": "?", "answer": 12}, {}, "number", "12", "about 12 cm", "12.5"),
        ({"question": "?", "answer": 100}, {"tolerance": 0.05}, "number", "100", "104", "106"),
        ({"question": "?", "answers": {"red": 0.6, "blue": 1}}, {}, "vqa", "blue", "the blue", "green"),
        ({"question": "?", "choices": ["cat", "dog"], "answer": "dog"}, {}, "choice", "B", "(b)", "A"),
        ({"question": "?", "choices": ["cat", "dog"], "answer": 1}, {}, "choice", "B", "B.", "dog"),
        ({"question": "?", "options": "cat|dog", "answer": "A"}, {}, "choice", "A", "A", "B"),
        ({"question": "?", "answer": ["cat", "kitten"]}, {}, "exact", "cat", "kitten", "dog"),
    ],
)
def test_scores(tmp_path: Path, row, settings, score, target, right, wrong) -> None:
    write(tmp_path / "rows.jsonl", [row] * 6)
    task = declared(tmp_path, file="rows.jsonl", **settings)
    samples = drawn(task, tmp_path, 2, 2).splits["evaluation"]
    assert task.settings.score == score and samples[0].target == target
    for answer, value in ((right, 100.0), (wrong, 0.0), (target, 100.0)):
        assert task.score(samples, {sample.sample_id: answer for sample in samples}).value == value


def test_weights_are_the_score(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [{"question": "?", "answers": {"red": 0.667, "blue": 1, "": 1}}] * 6)
    task = declared(tmp_path, file="rows.jsonl")
    samples = drawn(task, tmp_path, 2, 2).splits["evaluation"]
    assert task.score(samples, {sample.sample_id: "Red" for sample in samples}).value == pytest.approx(66.7)


def test_chats(tmp_path: Path) -> None:
    pictures(tmp_path, 3)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A cat."},
    ]
    llava = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]
    write(tmp_path / "chat.jsonl", [{"messages": chat}] * 2)
    write(tmp_path / "llava.jsonl", [{"image": "1.png", "conversations": llava}] * 2)
    (first, _), (second, _) = (
        list(declared(tmp_path, file=name).read(tmp_path, "evaluation")) for name in ("chat.jsonl", "llava.jsonl")
    )
    assert (first.question, first.target, first.images[0].path) == ("Be brief.\nWhat is it?", "A cat.", "0.png")
    assert (second.question, second.target, second.images[0].path) == ("What is it?", "A dog.", "1.png")
    write(tmp_path / "bad.jsonl", [{"messages": chat[:2]}] * 2)
    with pytest.raises(InputError, match="field 'messages' must end with what the assistant answers"):
        list(declared(tmp_path, file="bad.jsonl").index(tmp_path, "evaluation"))


def test_csv_and_a_folder_of_pictures_and_parquet_with_pictures_inside(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pictures(tmp_path)
    lines = ["file_name;question;answer", *(f'{n}.png;"What; {n}?";cat' for n in range(12))]
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        pictures(tmp_path / name)
        (tmp_path / name / "metadata.csv").write_text("\n".join(lines))
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    sample = next(declared(tmp_path, file="rows.csv").read(tmp_path, "evaluation"))
    assert (sample.sample_id, sample.images[0].path, sample.question) == (2, "0.png", "What; 0?")
    (tmp_path / "rows.csv").write_text("\n".join([*lines, "5.png;What"]) + "\n")
    with pytest.raises(InputError, match="line 14: has 2 columns, the first line has 3"):
        list(declared(tmp_path, file="rows.csv").index(tmp_path, "evaluation"))
    folder = declared(tmp_path, file=".")
    by_split = {
        split: [entry.images[0] for entry in folder.index(tmp_path, split)] for split in ("train", "evaluation")
    }
    assert by_split["train"][0] == "train/0.png" and by_split["evaluation"][11] == "test/11.png"
    stored = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    cells = [{"bytes": (tmp_path / f"{n}.png").read_bytes(), "path": None} for n in range(12)]
    pairs = [[cell, cell] for cell in cells]
    columns = {
        "image": pyarrow.array(cells, stored), "images": pyarrow.array(pairs, pyarrow.list_(stored)),
        "question": ["What?"] * 12, "answer": ["cat"] * 12,
    }  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    task = declared(tmp_path, file="rows.parquet", fields={"image": ["image", "images"]})
    sample = drawn(task, tmp_path, 1, 1, 1).splits["train"][0]
    row = sample.sample_id - 1
    assert [image.path for image in sample.images] == [
        cell_name("rows.parquet", row, "image"), *(cell_name("rows.parquet", row, "images", n) for n in (0, 1))
    ]  # fmt: skip
    assert all(image.sha256 for image in sample.images)


def test_a_profile_and_params_describe_tasks(tmp_path: Path) -> None:
    pictures(tmp_path)
    write(tmp_path / "pets.jsonl", ROWS)
    study = {"title": "Pets", "backbones": ["mini-idefics2"], "tasks": ["pets"], "methods": {"zero-shot": None}}
    profile = {
        "backbones": ["mini-idefics2"], "tasks": {"pets": {"file": "pets.jsonl"}, "mini-vqa": None},
        "studies": ["pets"], "data_root": str(tmp_path),
    }  # fmt: skip
    for name, content in {"profiles/own": profile, "studies/pets": study, "params": {"profile": "own"}}.items():
        (tmp_path / f"{name}.yaml").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    params = load(tmp_path / "params.yaml", ["tasks.pets.score=contains", "tasks.more.file=pets.jsonl"])
    assert params.run.tasks == ["pets", "mini-vqa"] and {"pets", "more"} <= set(tasks.names())
    assert tasks.get("pets").metric == "contains" and tasks.get("more").metric == "accuracy"
    with pytest.raises(InputError, match="the project has a task 'vqav2' already"):
        load(tmp_path / "params.yaml", ["tasks.vqav2.file=pets.jsonl"])
        tasks.get("vqav2")
    with pytest.raises(InputError, match="unknown key 'tasks.pets.scor'. Did you mean 'score'"):
        load(tmp_path / "params.yaml", ["tasks.pets.scor=exact"])


def test_real_pictures_and_questions(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to(shared_data / "images")
    questions = json.loads((shared_data / "vqav2/v2_OpenEnded_mscoco_train2014_questions.json").read_text())[
        "questions"
    ]
    answers = json.loads((shared_data / "vqav2/v2_mscoco_train2014_annotations.json").read_text())["annotations"]
    of_question = {record["question_id"]: record["answers"] for record in answers}
    picture = "images/train2014/COCO_train2014_{:012d}.jpg"
    rows = [
        {**record, "image": picture.format(record["image_id"]), "answers": of_question[record["question_id"]]}
        for record in questions
    ]
    write(tmp_path / "real.jsonl", random.Random(0).sample(rows, 30))
    task = declared(tmp_path, file="real.jsonl")
    samples = drawn(task, tmp_path, 10, 4).splits["evaluation"]
    assert task.settings.score == "vqa" and len(samples[0].references) == 10
    official = tasks.get("vqav2")
    same = {sample.sample_id: sample for sample in official.read(shared_data, "train")}
    answered = {sample.sample_id: sample.target for sample in samples}
    twins: list[Sample] = [same[sample.sample_id] for sample in samples]
    assert [twin.target for twin in twins] == list(answered.values())
    assert task.score(samples, answered).value == pytest.approx(official.score(twins, answered).value)


@pytest.mark.parametrize("layout", ["saved", "saved-splits", "shards", "split-folders"])
def test_what_datasets_writes_is_read_with_its_pictures_and_its_names_of_classes(tmp_path: Path, layout: str) -> None:
    datasets = pytest.importorskip("datasets")
    pictures(tmp_path)
    content = [(tmp_path / f"{n}.png").read_bytes() for n in range(12)]
    rows = {
        "image": [{"bytes": data, "path": None} for data in content],
        "more": [[{"bytes": data, "path": None}] * 2 for data in content],
        "question": [f"What is {n}?" for n in range(12)], "label": [n % 2 for n in range(12)],
    }  # fmt: skip
    kinds = {
        "image": datasets.Image(), "more": datasets.List(datasets.Image()), "question": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
    }  # fmt: skip
    whole = datasets.Dataset.from_dict(rows, datasets.Features(kinds)).select(range(11, -1, -1))
    splits = datasets.DatasetDict({"train": whole.select(range(8)), "test": whole.select(range(8, 12))})
    folder = tmp_path / "own"
    folder.mkdir()
    match layout:
        case "saved":
            whole.save_to_disk(folder, num_shards=2)
            (folder / "cache-1.arrow").write_bytes(b"of a map, and none of the data")
        case "saved-splits":
            splits.save_to_disk(folder)
        case "shards":
            for name, part in splits.items():
                part.to_parquet(folder / f"{name}-00000-of-00001.parquet")
        case _:
            for name, part in splits.items():
                (folder / name).mkdir()
                part.to_parquet(folder / name / "rows.parquet")
    task = declared(tmp_path, file="own", fields={"image": ["image", "more"]})
    assert task.one_pool == (layout == "saved")
    manifest = drawn(task, tmp_path, 4, 2, None if task.one_pool else 3)
    for sample in [sample for samples in manifest.splits.values() for sample in samples]:
        number = int(sample.question.split()[-1].rstrip("?"))
        assert sample.target == ("cat", "dog")[number % 2] and len(sample.images) == 3
        for image in sample.images:
            assert read_image(image, tmp_path) == content[number]
    assert manifest.sizes["evaluation"] == (6 if task.one_pool else 3)


def test_pictures_that_arrow_has_by_their_path_alone(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures(tmp_path)
    rows = {"image": [str(tmp_path / f"{n}.png") for n in range(12)], "question": ["?"] * 12, "answer": ["cat"] * 12}
    whole = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    whole.save_to_disk(tmp_path / "own")
    images = {
        image.path for sample in declared(tmp_path, file="own").read(tmp_path, "evaluation") for image in sample.images
    }
    assert {image.rpartition("#")[0] or image for image in images} <= {
        *(f"{n}.png" for n in range(12)), "own/data-00000-of-00001.arrow"
    }  # fmt: skip
    for path in images:
        assert read_image(path, tmp_path)
    (tmp_path / "own/data-00000-of-00001.arrow").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"data-00000-of-00001.arrow: is no whole Arrow file .*get it again"):
        list(declared(tmp_path, file="own").read(tmp_path, "evaluation"))
    (tmp_path / "own/data-00000-of-00001.arrow").unlink()
    with pytest.raises(InputError, match=r"state.json: names data-00000-of-00001.arrow, which is not there"):
        declared(tmp_path, file="own")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("own.csv", "question,answer\nWas?,K\xe4se\n".encode("latin-1"), "line 2, byte 7, is not UTF-8. Save it"),
        ("own.csv", "question,answer\n".encode("utf-16"), "own.csv: line 1, byte 1, is not UTF-8. Save it as UTF-8"),
        ("own.csv", b'question,answer\na,b\n"c,d\ne,f\n', "line 3: unexpected end of data. Mend that line"),
        ("own.csv", b"A,B\n1,2\n", "no column was found that holds the answers; there are A, B.*--field question"),
        ("own.jsonl", b'[{"question": "?", "answer": "a"}]', "line 1 is a list, an object is needed; a file"),
        ("own.jsonl", b'{"question": "?", "answer": NaN}', "line 1: field 'answer' is nan, a text or a number"),
        ("own.json", b'{"1": {"question": "?"}}', r"own.json: holds no list of objects. Write \[\{...\}, \{...\}\]"),
        ("own.jsonl", b'{"image": "%s", "answer": "a"}' % (b"iVBO" * 99), "'image' is \"iVBO.*, no path: save"),
        ("own.jsonl", b'{"image": "d\\\\no.png", "answer": "a"}', "'image' is \"d/no.png\", which is no file below"),
        ("own.csv", b"question,A,B,C,answer\n?,cat,,cow,C\n?,a,b,c,A\n", "field 'B' is empty before another choice"),
    ],
)  # fmt: skip
def test_odd_files_are_named_with_line_and_field(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        list(declared(tmp_path, file=name).index(tmp_path, "evaluation"))


@pytest.mark.parametrize(
    ("name", "content", "score", "target"),
    [
        ("own.csv", "\ufeffquestion,answer\n?,Käse\n", "exact", "Käse"),
        ("own.json", '{"question": "?", "answer": "a"}\n{"question": "?", "answer": "b"}\n', "exact", "a"),
        ("own.csv", 'question,answers\n?,"[""a b c d e f"", ""b""]"\n', "exact", "a b c d e f"),
        ("own.csv", 'question,answers\n?,"{""a"": 0.3, ""b"": 1}"\n', "vqa", "b"),
        ("own.jsonl", '{"answers": [{"answer": "a", "weight": 0.3}, {"answer": "b", "weight": 1}]}', "vqa", "b"),
        ("own.csv", "question,A,B,C,answer\n?,cat,dog,,B\n", "choice", "B"),
        ("own.jsonl", '{"prompt": "?", "completion": "a", "fold": 1}', "exact", "a"),
    ],
)  # fmt: skip
def test_odd_files_that_are_meant_well(tmp_path: Path, name: str, content: str, score: str, target: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    task = declared(tmp_path, file=name)
    sample = next(task.read(tmp_path, "evaluation"))
    assert (task.settings.score, sample.target, task.settings.split) == (score, target, "drawn")


def test_what_is_not_used_is_said(tmp_path: Path) -> None:
    write(tmp_path / "own.jsonl", [{"instruction": "Name it.", "input": "x", "output": "y", "left": "0.png"}])
    task = declared(tmp_path, file="own.jsonl")
    assert task.guessed[-1] == "not used: 'instruction', 'left'"


def test_a_chat_with_pictures_shows_them(tmp_path: Path) -> None:
    """Its prompt has their place, whichever way a part names its picture."""
    pictures(tmp_path, 3)
    parts = [{"type": "image", "image": "0.png"}, {"type": "image_url", "image_url": {"url": "1.png"}}]
    turn = {"role": "user", "content": [*parts, {"type": "text", "text": "Same?"}]}
    write(tmp_path / "own.jsonl", [{"messages": [turn, {"role": "assistant", "content": "No."}]}])
    task = declared(tmp_path, file="own.jsonl")
    sample = next(task.read(tmp_path, "evaluation"))
    assert [image.path for image in sample.images] == ["0.png", "1.png"]
    assert task.template.query == "Image: {image} Question: {question} Answer:"
    with pytest.raises(InputError, match=r"it has no \{image\}, the rows have images"):
        declared(tmp_path, file="own.jsonl", prompt="Q: {question} A:")


def test_a_picture_that_cannot_be_read_is_named_by_its_row(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "3.png").write_bytes(b"no picture")
    write(tmp_path / "pets.jsonl", ROWS)
    said = r"3.png \(pets.jsonl line 7, field 'image'\): the file is no image .*bad_rows: leave-out"
    with pytest.raises(InputError, match=re.compile(said, re.DOTALL)):
        drawn(declared(tmp_path, file="pets.jsonl"), tmp_path)
    manifest = drawn(declared(tmp_path, file="pets.jsonl", bad_rows="leave-out"), tmp_path)
    assert sum(manifest.sizes.values()) == 22
    assert manifest.notes[-1].startswith("2 rows are left out, whose picture cannot be read: pets.jsonl line 7, field")
