"""Several tasks as one: whose prompt a sample has, what is trained on, and how it is scored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks.support.synthetic import SyntheticSize, write_vqav2
from pipeline import tasks
from pipeline.config.load import Params
from pipeline.config.schema import Subsample, TaskFile
from pipeline.config.trial import TrialConfig
from pipeline.core.errors import InputError
from pipeline.data.manifest import Manifest, Source
from pipeline.data.sample import ImageRef, Sample
from pipeline.plan.plan import places
from pipeline.sweep.draw import draw_task
from pipeline.tasks.mixture import Mixture
from pipeline.train import teacher

NAME = "mini-vqa+mini-coco"


def sample(task: str, number: int, picture: int) -> Sample:
    asks = task != "mini-coco"
    return Sample(
        task, number, (ImageRef(f"{picture}.png", f"{picture:064x}"),), "Which colour?" if asks else None,
        target="red", references=("red",) * 10 if asks else ("a red square",) * 5,
    )  # fmt: skip


def manifest(task: str, first: int, root: Path) -> Manifest:
    """Four training samples, two to choose by and two to evaluate on, of pictures that are numbered on."""
    made = [sample(task, number, number) for number in range(first, first + 8)]
    splits = {"train": tuple(made[:4]), "selection": tuple(made[4:6]), "evaluation": tuple(made[6:])}
    return Manifest(task, 0, (Source("shared.json", "ab" * 32, 1), Source(f"{task}.json", "cd" * 32, 1)), splits, root)


@pytest.fixture
def mixture() -> Mixture:
    made = tasks.get(NAME)
    assert isinstance(made, Mixture)
    return made


def mixed(mixture: Mixture, root: Path, **sizes: int | None) -> Manifest:
    manifests = [manifest("mini-vqa", 0, root), manifest("mini-coco", 100, root)]
    return mixture.mix(manifests, {"train": 6, "selection": 3, "evaluation": None, **sizes})


def test_a_sample_has_the_prompt_of_its_own_task_and_an_answer_ends_where_any_of_them_does(mixture):
    vqa, coco = tasks.get("mini-vqa"), tasks.get("mini-coco")
    assert mixture.template_for(sample("mini-vqa", 1, 1)) == vqa.template
    assert mixture.template_for(sample("mini-coco", 1, 1)) == coco.template != vqa.template
    assert set(mixture.template.stop_words) == {*vqa.template.stop_words, *coco.template.stop_words}
    assert mixture.max_new_tokens == max(vqa.max_new_tokens, coco.max_new_tokens)
    assert (mixture.name, mixture.stands_for, mixture.definition) == (NAME, NAME, None)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mini-vqa+mini-vqa", "the mixture mini-vqa[+]mini-vqa: names a task twice. Name each task once"),
        ("mini-vqa+mini-koko", "mini-koko.*mini-coco"),
        ("mini-vqa+", "task ''"),
    ],
)
def test_what_is_no_mixture_is_refused(name, says):
    with pytest.raises(InputError, match=says):
        tasks.get(name)


def test_the_samples_of_its_tasks_stand_in_turn(mixture, tmp_path):
    whole = mixed(mixture, tmp_path)
    train = [(entry.task, entry.sample_id) for entry in whole.splits["train"]]
    assert train[:3] == [("mini-vqa", "mini-vqa/0"), ("mini-coco", "mini-coco/100"), ("mini-vqa", "mini-vqa/1")]
    assert whole.sizes == {"train": 6, "selection": 3, "evaluation": 4}
    assert [source.path for source in whole.sources] == ["mini-coco.json", "mini-vqa.json", "shared.json"]
    whole.save(tmp_path / "m.json")
    again = Manifest.load(tmp_path / "m.json")
    assert again.digest == whole.digest and tasks.of_manifest(again) == mixture
    assert mixed(mixture, tmp_path, train=4).splits["train"] == whole.splits["train"][:4]


def test_a_picture_that_one_of_them_is_evaluated_on_is_trained_on_by_none(mixture, tmp_path):
    vqa, coco = manifest("mini-vqa", 0, tmp_path), manifest("mini-coco", 100, tmp_path)
    shared = vqa.splits["evaluation"][0].images
    first, *others = coco.splits["train"]
    coco = replace(coco, splits={**coco.splits, "train": (replace(first, images=shared), *others)})
    whole = mixture.mix([vqa, coco], {"train": 7, "selection": 1, "evaluation": 1})
    assert "mini-coco/100" not in [entry.sample_id for entry in whole.splits["train"]]
    with pytest.raises(InputError, match=r"8 samples were asked for in train, its tasks have 7.*subsample.num_train"):
        mixture.mix([vqa, coco], {"train": 8, "selection": 1, "evaluation": 1})


def test_its_score_is_the_mean_of_its_tasks_scores(mixture, tmp_path):
    samples = mixed(mixture, tmp_path).splits["evaluation"]
    answers = {entry.sample_id: "red" if entry.task == "mini-vqa" else "a red square" for entry in samples}
    parts = {name: [s for s in samples if s.task == name] for name in ("mini-vqa", "mini-coco")}
    alone = {name: tasks.get(name).score(group, answers).value for name, group in parts.items()}
    score = mixture.score(samples, answers)
    assert alone["mini-vqa"] == 100
    assert score.value == pytest.approx((1 + alone["mini-coco"]) / 2)
    assert score.metrics == {"mini-vqa_accuracy": 100, "mini-coco_CIDEr": alone["mini-coco"]}
    assert score.per_sample.keys() == answers.keys()
    wrong = mixture.score(samples, {**answers, "mini-vqa/6": "blue"})
    assert wrong.metrics["mini-vqa_accuracy"] == 50 and wrong.value == pytest.approx(score.value - 0.25)
    with pytest.raises(InputError, match="1 of 4 samples have no prediction: mini-vqa/6"):
        mixture.score(samples, {key: answers[key] for key in answers if key != "mini-vqa/6"})


def test_a_task_over_a_file_is_made_again_from_the_manifest(mixture):
    settings = TaskFile.model_validate(
        {"file": "own.jsonl", "score": "exact", "prompt": "Image: {image} {question} A:", "max_new_tokens": 3,
         "split": "drawn", "fields": {"id": "#", "question": "question", "answer": "answer", "image": "image"}}
    )  # fmt: skip
    described = {"mini-vqa": None, "own": settings.model_dump(mode="json")}
    made = tasks.tasks.made("mini-vqa+own", described)
    assert isinstance(made, Mixture) and made.definition == described
    assert [part.name for part in made.parts] == ["mini-vqa", "own"] and made.parts[1].max_new_tokens == 3


def test_its_files_are_those_of_its_tasks_and_its_samples_have_ids_of_its_own(tmp_path):
    for subset, first in (("train2014", 1), ("val2014", 11)):
        write_vqav2(tmp_path, subset, SyntheticSize(num_questions=4, num_images=2), first_image=first)
        (tmp_path / "images" / subset).mkdir(parents=True, exist_ok=True)
    both, one = tasks.get("mini-vqa+vqav2"), tasks.get("vqav2")  # two tasks in one shape, here over the same files
    assert both.files(tmp_path, "train") == one.files(tmp_path, "train")
    ids = [entry.sample_id for entry in one.index(tmp_path, "train")]
    named = [f"{name}/{sample_id}" for name in ("mini-vqa", "vqav2") for sample_id in ids]
    assert [entry.sample_id for entry in both.index(tmp_path, "train")] == named and len(named) == 8
    assert [entry.sample_id for entry in both.read(tmp_path, "train")] == named
    (chosen,) = both.read(tmp_path, "train", {named[-1]})
    assert (chosen.task, chosen.sample_id) == ("vqav2", named[-1])


def test_the_stage_draws_it_from_its_tasks_manifests(tmp_path):
    sizes = Subsample.model_validate({"num_train": 5, "num_selection": 2, "num_evaluation": "whole"})
    params = cast(Params, SimpleNamespace(subsample=sizes))
    folders = places(tmp_path)
    with pytest.raises(InputError, match=r"mini-vqa/manifest.json.*[Dd]raw it again"):
        draw_task(params, NAME, tmp_path)
    for task, first in (("mini-vqa", 0), ("mini-coco", 100)):
        manifest(task, first, tmp_path).save(folders.manifest(task))
    draw_task(params, NAME, tmp_path)
    assert Manifest.load(folders.manifest(NAME)).sizes == {"train": 5, "selection": 2, "evaluation": 4}


def test_a_teacher_shows_a_sample_others_of_its_own_task(mixture, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "decoder_of", lambda model: None)
    whole = mixed(mixture, tmp_path, train=8)
    pool, facts = whole.splits["train"], SimpleNamespace(teacher="logits")
    config = TrialConfig.model_validate(
        {
            "backbone": "b",
            "backbone_digest": "d",
            "task": NAME,
            "manifest_digest": "d",
            "method": "mimic",
            "num_shots": 3,
        }
    )
    resident: Any = SimpleNamespace(loaded=SimpleNamespace(model=None))
    made = teacher.Teacher(resident, whole, pool, config, cast(Any, facts))
    for entry in pool:
        shown = made.demonstrations(entry, 1)
        assert {other.task for other in shown} == {entry.task}
        assert len({other.sample_id for other in shown} - {entry.sample_id}) == 3
