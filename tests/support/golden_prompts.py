"""Golden prompts: what every backbone reads for every task, from processors of the real class.

Write them again after a wanted change: `.venv/bin/python -m tests.support.golden_prompts`, and look at the difference.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline import backbones
from pipeline.data.sample import ImageRef, Sample
from pipeline.prompts.prompt import Encoded, Rendered, encode_all, render, stop_strings
from pipeline.tasks import mmmu_pro, seed_bench, tasks
from pipeline.tasks.choice_files import with_choices

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "prompts"
SHOTS = (0, 1, 8)
SIZE = (56, 56)  # (height, width) of every image
QUESTIONS = ("What color is the dog?", "How many cats are there?", "Is it raining?")
ANSWERS = ("red", "2", "no")
CAPTIONS = ("a dog on the grass", "two cats in a room.", "A man with an umbrella, in the rain")
LETTERS = ("A", "C", "B")
# what a sample of a task looks like: its questions, its targets, its images
FORMS: dict[str, tuple[tuple[str | None, ...], tuple[str, ...], int]] = {
    "vqav2": (QUESTIONS, ANSWERS, 1),
    "okvqa": (QUESTIONS, ANSWERS, 1),
    "coco": ((None,), CAPTIONS, 1),
    "flickr30k": ((None,), CAPTIONS, 1),
    "mme": (("Is there a dog in this image?",), ("Yes", "No"), 1),
    "seed-bench": (
        tuple(with_choices(q, ["one", "two", "three", "four"], seed_bench.CLOSING) for q in QUESTIONS),
        LETTERS,
        1,
    ),
    "mmmu-pro": (
        tuple(with_choices(q, [f"option {i}" for i in range(10)], mmmu_pro.CLOSING) for q in QUESTIONS),
        LETTERS,
        2,
    ),
}
TASKS = sorted(FORMS)


def sample(task: str, number: int) -> Sample:
    """Return a made-up sample of a task."""
    questions, targets, images = FORMS[task]
    target = targets[number % len(targets)]
    refs = tuple(ImageRef(f"{number}-{i}.png") for i in range(images))
    return Sample(task, number, refs, questions[number % len(questions)], target, (target,))


def prompt(loaded: Any, task: str, shots: int, *, answer: bool) -> tuple[Rendered, Encoded]:
    """Return sample 0's prompt behind samples 1 to `shots`, as text and as token ids."""
    demos = [sample(task, 1 + i) for i in range(shots)]
    rendered = render(tasks.get(task).template, loaded.backbone, sample(task, 0), demos, answer=answer)
    return rendered, encode_all(loaded, [rendered], image_sizes=[[SIZE] * len(rendered.images)])[0]


def record(loaded: Any, task: str, shots: int) -> dict[str, Any]:
    """Return one golden entry, of the prompt with its answer."""
    rendered, encoded = prompt(loaded, task, shots, answer=True)
    return {
        "text": rendered.text,
        "answer": rendered.text[slice(*(rendered.answer_span or (0, 0)))],
        "num_tokens": len(encoded),
        "num_image_tokens": encoded.input_ids.count(loaded.image_token_id),
        "answer_tokens": list(encoded.answer_span or ()),
        "query_start": encoded.query_start,
        "ids_sha256": hashlib.sha256(json.dumps(encoded.input_ids).encode()).hexdigest()[:16],
        "last_ids": list(encoded.input_ids[-12:]),
    }


def records(loaded: Any) -> dict[str, Any]:
    """Return a backbone's golden file."""
    return {
        task: {
            "stop": list(stop_strings(tasks.get(task).template, loaded.backbone)),
            "shots": {str(shots): record(loaded, task, shots) for shots in SHOTS},
        }
        for task in TASKS
    }


def path(backbone: str) -> Path:
    """Return the golden file of a backbone."""
    return FOLDER / f"{backbone}.json"


def main() -> None:
    """Write every backbone's golden file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in backbones.names():
        found = records(backbones.load(name, variant="tiny"))
        path(name).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path(name)}: {len(found)} tasks")  # noqa: T201


if __name__ == "__main__":
    main()
