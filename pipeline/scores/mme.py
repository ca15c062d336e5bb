"""MME: accuracy, accuracy+ and the sums of perception and cognition, by the official rules.

Fu et al. 2023 (MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models), and the
evaluation tool published with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.core.errors import InputError
from pipeline.scores.files import JsonObject, read_text

GROUPS = {
    "Perception": (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    ),
    "Cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip
_TASKS = tuple(task for tasks in GROUPS.values() for task in tasks)
_QUESTIONS_OF_AN_IMAGE = 2
_COLUMNS = ("image", "question", "ground truth", "response")
# The official parser looks no further than this into a response.
_LETTERS_READ = 4


@dataclass(frozen=True)
class MmeRow:
    """One question of MME with its response."""

    image: str
    truth: str
    response: str
    place: str = ""


@dataclass(frozen=True)
class MmeTask:
    """One subtask: both accuracies in percent, their sum the score (at most 200), and each image's part of it."""

    accuracy: float
    accuracy_plus: float
    num_questions: int
    by_image: tuple[float, ...] = ()

    @property
    def score(self) -> float:
        """Return accuracy + accuracy+, the points of the subtask."""
        return self.accuracy + self.accuracy_plus


@dataclass(frozen=True)
class MmePoints:
    """The points of the subtasks of "Perception" or "Cognition", and their sum."""

    tasks: dict[str, float]
    total: float


@dataclass(frozen=True)
class MmeScore:
    """MME over the subtasks that were scored."""

    tasks: dict[str, MmeTask]

    def group(self, name: str) -> MmePoints:
        """Return the points of "Perception" or "Cognition"."""
        points = {task: self.tasks[task].score for task in GROUPS[name] if task in self.tasks}
        return MmePoints(points, sum(points.values()))

    def as_dict(self) -> JsonObject:
        """Return the numbers as plain JSON values."""
        return {
            **{name: asdict(self.group(name)) for name in GROUPS},
            "accuracy": {name: task.accuracy for name, task in self.tasks.items()},
            "accuracy_plus": {name: task.accuracy_plus for name, task in self.tasks.items()},
            "n_questions": sum(task.num_questions for task in self.tasks.values()),
        }


def read_reply(response: str) -> str:
    """Return "yes", "no" or "other", as the official tool reads a response.

    Only the first four lower-case characters count, and "yes" is looked for before "no": "not sure"
    is a no, "the answer is yes" is other.
    """
    start = response.lower()[:_LETTERS_READ]
    return next((reply for reply in ("yes", "no") if reply in start), "other")


def mme_scores(rows: Mapping[str, Sequence[MmeRow]]) -> MmeScore:
    """Return MME's accuracy and accuracy+ of each subtask.

    accuracy = right replies / questions, accuracy+ = images with both questions right / images, both
    times 100; a subtask's points are their sum (Fu et al. 2023, Sec. 2.2).

    Args:
        rows: {subtask: its questions, the two of one image next to each other}.

    Raises:
        InputError: no subtask, an unknown one, a question without its partner, or a ground truth that is not yes or no.
    """
    if not rows:
        raise InputError("there is no subtask to score", way_out=f"Known subtasks: {', '.join(_TASKS)}")
    unknown = sorted(set(rows) - set(_TASKS))
    if unknown:
        raise InputError(f"unknown subtask '{unknown[0]}'", way_out=f"Known subtasks: {', '.join(_TASKS)}")
    return MmeScore({task: subtask_score(_pairs(task, rows[task])) for task in _TASKS if task in rows})


def subtask_score(images: Sequence[Sequence[MmeRow]]) -> MmeTask:
    """Return accuracy and accuracy+ of one subtask.

    Args:
        images: the questions of each image. One with a single question (a draw may be cut between the two) counts in
            accuracy alone; where all are so, accuracy+ is 0.

    Raises:
        InputError: a ground truth that is not yes or no.
    """
    right = [[is_right(row) for row in rows] for rows in images]
    replies = [reply for image in right for reply in image]
    both = [all(rows) for rows in right if len(rows) == _QUESTIONS_OF_AN_IMAGE]
    points = tuple(100 * (sum(rows) / len(rows) + all(rows)) for rows in right)
    plus = 100 * sum(both) / len(both) if both else 0.0
    return MmeTask(100 * sum(replies) / len(replies), plus, len(replies), points)


def _pairs(name: str, rows: Sequence[MmeRow]) -> list[Sequence[MmeRow]]:
    if not rows:
        raise InputError("holds no question", where=name, way_out="Give the responses of this subtask")
    pairs = []
    for at in range(0, len(rows), _QUESTIONS_OF_AN_IMAGE):
        pair = rows[at : at + _QUESTIONS_OF_AN_IMAGE]
        if len(pair) < _QUESTIONS_OF_AN_IMAGE or len({row.image for row in pair}) > 1:
            raise InputError(
                f"image '{pair[0].image}' does not have its two questions next to each other",
                where=pair[0].place or name,
                way_out="accuracy+ needs both questions of every image, on adjacent lines",
            )
        pairs.append(pair)
    return pairs


def is_right(row: MmeRow) -> bool:
    """Tell whether the response says what the ground truth says.

    Raises:
        InputError: a ground truth that is not yes or no.
    """
    truth = row.truth.strip().lower()
    if truth not in ("yes", "no"):
        raise InputError(
            f"the ground truth is '{row.truth}'", where=row.place, way_out="MME's ground truth is Yes or No"
        )
    return read_reply(row.response) == truth


def read_results(folder: str | Path, *, subset: bool = False) -> dict[str, list[MmeRow]]:
    """Return the rows of an official result folder: `<subtask>.txt`, four columns between tabs.

    Args:
        folder: holds one file a subtask.
        subset: accept a folder that lacks subtasks (its sums then cover those that are there).

    Raises:
        InputError: no folder, a missing subtask, or a line that lacks a column.
    """
    home = Path(folder)
    if not home.is_dir():
        raise InputError("no such folder", where=str(folder), way_out="Give the folder of MME's <subtask>.txt files")
    missing = [task for task in _TASKS if not (home / f"{task}.txt").is_file()]
    if len(missing) == len(_TASKS) or (missing and not subset):
        way_out = "Both sums need all 14 subtasks; --subset scores those that are there"
        raise InputError(f"lacks {', '.join(f'{task}.txt' for task in missing)}", where=str(folder), way_out=way_out)
    return {task: list(_read_task(home / f"{task}.txt")) for task in _TASKS if task not in missing}


def _read_task(path: Path) -> Iterable[MmeRow]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        columns = line.rstrip("\r").split("\t", len(_COLUMNS) - 1)
        if len(columns) < len(_COLUMNS):
            way_out = f"A line holds {', '.join(_COLUMNS)}, with tabs between them"
            raise InputError(f"has {len(columns)} columns", where=place, way_out=way_out)
        yield MmeRow(image=columns[0], truth=columns[2], response=columns[3], place=place)
