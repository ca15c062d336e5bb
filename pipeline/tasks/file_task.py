"""A task over a file of the user's own, as params.yaml or a profile describes it: no Python beside this."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

from pipeline.config.schema import TaskFile, TaskSplit
from pipeline.core.errors import InputError, validate
from pipeline.core.files import stamp
from pipeline.core.plain_yaml import Json
from pipeline.data.parquet import is_cell
from pipeline.data.rows import Row, parts, read
from pipeline.data.sample import Sample
from pipeline.scores.vqa import normalise_answer, vqa_accuracy
from pipeline.tasks import IndexEntry, PromptTemplate, SampleId, Score, Split, Task, tasks
from pipeline.tasks.caption_files import CAPTION_TEMPLATE, cider_score
from pipeline.tasks.choice_files import letter_of
from pipeline.tasks.file_rows import (
    DRAWN,
    ROW_NUMBER,
    Completed,
    RowError,
    RowReader,
    completed,
    inner,
    number_in,
    short,
)
from pipeline.tasks.vqa import VQA_TEMPLATE

_NAMED = 5  # rows of one message; the others are counted
_CUE = re.compile(r"\b([A-Z]\w*):")
_METRICS = {"exact": "exact_match", "contains": "contains", "number": "number_match", "cider": "CIDEr"}
_PAPERS = {template.query: template for template in (VQA_TEMPLATE, CAPTION_TEMPLATE)}


@dataclass(frozen=True)
class Scan:
    """What a whole file holds: what the draw needs of each row, by split, and what is wrong with the others."""

    entries: Mapping[str, Sequence[IndexEntry]]
    problems: tuple[str, ...]
    num_problems: int
    num_rows: int


@dataclass(frozen=True)
class FileTask(Task):
    """A task over rows of a file.

    Attributes:
        settings: complete: nothing in them is left to guess.
        guessed: what was guessed of them, in words.
    """

    name: str
    settings: TaskFile
    guessed: tuple[str, ...] = ()
    stands_for: str = ""
    metric: str = "accuracy"
    unit: Literal["percent", "fraction"] = "percent"
    template: PromptTemplate = VQA_TEMPLATE
    max_new_tokens: int = 10
    one_pool: bool = True

    @classmethod
    def of(cls, name: str, given: Completed) -> FileTask:
        """Return the task that complete settings describe."""
        settings = given.settings
        score = settings.score or "exact"
        return cls(
            name, settings, given.guessed, stands_for=name, metric=_METRICS.get(score, "accuracy"),
            unit="fraction" if score == "cider" else "percent", template=_template(settings),
            max_new_tokens=settings.max_new_tokens or 10, one_pool=settings.split == DRAWN,
        )  # fmt: skip

    @property
    def definition(self) -> Json:
        """What the manifest keeps of the task: its complete settings."""
        return cast(Json, self.settings.model_dump(mode="json"))

    def notes(self, root: Path) -> tuple[str, ...]:
        """Return what was guessed, and how many rows were left out and why, with the first of them."""
        scan = self._scan(root)
        left = f"{scan.num_problems} of {scan.num_rows} rows are left out: {_some(scan)}" if scan.num_problems else ""
        return (*(f"guessed: {line}" for line in self.guessed), *([left] if left else []))

    @property
    def leaves_out(self) -> bool:
        """Whether a sample whose picture cannot be read is left out, as other rows that cannot be used are."""
        return self.settings.bad_rows == "leave-out"

    def places(self, root: Path, images: Collection[str]) -> dict[str, str]:
        """Return the first row and field that name each image."""
        reader, wanted, places = self._reader(root), set(images), dict[str, str]()
        for row in self._rows(root) if wanted else ():
            try:
                named = [image.path for image in reader.sample(row).images]
            except RowError:
                continue
            for path in wanted.intersection(named):
                places[path] = f"{reader.shown(row.file)} line {row.line}, field '{_column_of(self.settings)}'"
            wanted.difference_update(named)
            if not wanted:
                break
        return places

    def pools(self, root: Path) -> tuple[Split, ...]:
        """Return the pools that the splits are drawn from; selection has its own where rows are marked so."""
        if self.one_pool:
            return ("evaluation",)
        return ("evaluation", "train", *(("selection",) if self._scan(root).entries.get("selection") else ()))

    def files(self, root: Path, split: Split) -> tuple[Path, ...]:
        """Return the files of the data set, whichever split they hold."""
        del split
        return tuple(part.file for part in parts(root / self.settings.file))

    def index(self, root: Path, split: Split) -> Iterator[IndexEntry]:
        """Yield id, images and group of every row of `split`.

        Raises:
            InputError: rows that cannot be used, with their number and the first of them by line and field, unless
                they are to be left out; or no row of the split.
        """
        scan = self._scan(root)
        if scan.num_problems and self.settings.bad_rows == "refuse":
            set_so = f"tasks.{self.name}.bad_rows: leave-out (adapt: --bad-rows leave-out)"
            way_out = f"Mend them; or {set_so}, and they are counted and named"
            rows = "row" if scan.num_problems == 1 else "rows"
            raise InputError(
                f"{scan.num_problems} of {scan.num_rows} {rows} cannot be used: {_some(scan)}",
                where=str(root / self.settings.file), way_out=way_out,
            )  # fmt: skip
        if not scan.entries.get(split) and isinstance(self.settings.split, TaskSplit):
            asked = ", ".join(getattr(self.settings.split, split))
            column = self.settings.split.column
            raise InputError(
                f"no row has '{column}' of the {split} split ({asked})", where=f"tasks.{self.name}.split",
                way_out=f"Say which: split: {{column: {column}, train: [...], evaluation: [...]}}; or split: {DRAWN} "
                f"(adapt: --split COLUMN or --split {DRAWN})",
            )  # fmt: skip
        yield from scan.entries.get(split, ())

    def read(self, root: Path, split: Split, only: Collection[SampleId] | None = None) -> Iterator[Sample]:
        """Yield the samples; see `Task.read`."""
        wanted = None if only is None else set(only)
        reader = self._reader(root)
        for row in self._rows(root):
            try:
                if (wanted is None or reader.sample_id(row) in wanted) and reader.split(row) == split:
                    yield reader.sample(row)
            except RowError:  # `index` has named it
                continue

    def score(self, samples: Sequence[Sample], predictions: Mapping[SampleId, str]) -> Score:
        """Score by the task's own kind of score; each is defined in docs/data.md."""
        if self.settings.score == "cider":
            return cider_score(self, samples, predictions)
        answers = self.predictions_for(samples, predictions)
        if self.settings.score == "vqa" and not any(sample.meta.get("weights") for sample in samples):
            result = vqa_accuracy(
                {sample.sample_id: answer for sample, answer in zip(samples, answers, strict=True)},
                {sample.sample_id: sample.references for sample in samples},
                normalise="always",
            )
            return Score(result.overall, self.metric, dict(result.per_question))
        right = _RIGHT[self.settings.score or "exact"]
        per_sample = {
            sample.sample_id: 100.0 * right(answer, sample, self.settings.tolerance)
            for sample, answer in zip(samples, answers, strict=True)
        }
        return Score(sum(per_sample.values()) / len(per_sample), self.metric, per_sample)

    def _reader(self, root: Path) -> RowReader:
        return RowReader(self.name, self.settings, root.resolve(), len(self.files(root, "train")) > 1)

    def _rows(self, root: Path) -> Iterator[Row]:
        base = root.resolve()
        for part in parts(base / self.settings.file):
            yield from read(part)

    def _scan(self, root: Path) -> Scan:
        marks = tuple(map(stamp, self.files(root, "train")))
        return _scanned(self.name, self.settings.model_dump_json(), str(root.resolve()), marks)


@lru_cache(maxsize=1)  # of a million rows there is room for one
def _scanned(name: str, settings: str, root: str, marks: tuple[tuple[int, ...], ...]) -> Scan:
    """Go through a whole file once; the marks tell one version of its files from another."""
    del marks
    task = FileTask.of(name, Completed(TaskFile.model_validate_json(settings), ()))
    reader = task._reader(Path(root))
    entries: dict[str, list[IndexEntry]] = {}
    problems: list[str] = []
    bad = number = 0
    seen: dict[SampleId, int] = {}
    images: dict[tuple[str, ...], tuple[str, ...]] = {}  # one tuple a picture, shared by its rows
    there: dict[str, bool] = {}
    for number, row in enumerate(task._rows(Path(root)), start=1):  # noqa: B007 - the last one counts the rows
        try:
            sample = reader.sample(row)
            if sample.sample_id in seen:
                column = task.settings.fields.id or ""
                problem = f"is {sample.sample_id!r} again, as in line {seen[sample.sample_id]}"
                way_out = f'`id: "{ROW_NUMBER}"` (adapt: --field id={ROW_NUMBER}) takes the line'
                raise RowError(column, f"{problem}; {way_out}")
            paths = tuple(dict.fromkeys(image.path for image in sample.images))
            for path in paths:
                if path not in there:
                    there[path] = is_cell(place := Path(root, path)) or place.is_file()
                if not there[path]:
                    raise RowError(_column_of(task.settings), f"is {short(path)}, which is no file below {root}")
            # the rows of an image go to one split, so that none of them is lost
            split, group = reader.split(row), reader.group(row) or (paths[0] if paths else None)
        except RowError as error:
            bad += 1
            if len(problems) < _NAMED:
                problems.append(f"{reader.shown(row.file)} line {row.line}: {error}")
            continue
        seen[sample.sample_id] = row.line
        if split:
            entries.setdefault(split, []).append(IndexEntry(sample.sample_id, images.setdefault(paths, paths), group))
    return Scan(entries, tuple(problems), bad, number)


def _column_of(settings: TaskFile) -> str:
    columns = settings.fields.image or settings.fields.messages or ""
    return columns if isinstance(columns, str) else ", ".join(columns)


def _some(scan: Scan) -> str:
    more = scan.num_problems - len(scan.problems)
    return "; ".join(scan.problems) + (f"; and {more} more" if more else "")


def _template(settings: TaskFile) -> PromptTemplate:
    """Return the prompt: the papers' whole template where the words around a sample are theirs."""
    prompt = settings.prompt or ""
    middle = inner(prompt)
    query = prompt.replace(middle, "{question}") if middle else prompt
    cues = tuple(dict.fromkeys(_CUE.findall(re.sub(r"\{\w*\}", "", prompt))))
    printed = _PAPERS.get(query) if settings.instruction is None and settings.score != "choice" else None
    if printed is not None and middle in ("", "{question}"):
        return printed
    instruction = (settings.instruction or "").strip()
    return PromptTemplate(
        prefix=f"{instruction}\n" if instruction else "", prefix_needs_demos=False, query=query,
        answer=" {answer}\n", stop_words=tuple(f"{cue}:" for cue in cues), instruction=instruction,
        cue=cues[-1] if cues else "Answer",
    )  # fmt: skip


def _plain(text: str) -> str:
    """Return a text as `exact` compares it: one form of each letter, small, single spaces, no full stop at its end."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".").rstrip()


def _is_exact(answer: str, sample: Sample, tolerance: float) -> float:
    del tolerance
    return float(_plain(answer) in {_plain(text) for text in sample.references})


def _is_in_it(answer: str, sample: Sample, tolerance: float) -> float:
    """Whether a reference stands in the answer, as whole words."""
    del tolerance
    text = _plain(answer)
    return float(
        any(re.search(rf"(?<!\w){re.escape(_plain(reference))}(?!\w)", text) for reference in sample.references)
    )


def _is_choice(answer: str, sample: Sample, tolerance: float) -> float:
    del tolerance
    return float(letter_of(answer) == sample.references[0])


def _is_number(answer: str, sample: Sample, tolerance: float) -> float:
    said = number_in(answer)
    wanted = [number for text in sample.references if (number := number_in(text)) is not None]
    return float(said is not None and any(abs(said - number) <= tolerance * abs(number) for number in wanted))


def _weighted(answer: str, sample: Sample, tolerance: float) -> float:
    """Return the weight of the answer that was given, by VQA's normalisation."""
    del tolerance
    said = normalise_answer(answer)
    weights = sample.meta.get("weights") or [1.0] * len(sample.references)
    given = (weight for text, weight in zip(sample.references, weights, strict=True) if normalise_answer(text) == said)
    return max(given, default=0.0)


_RIGHT: Mapping[str, Callable[[str, Sample, float], float]] = {
    "exact": _is_exact, "contains": _is_in_it, "choice": _is_choice, "number": _is_number, "vqa": _weighted,
}  # fmt: skip


def _built(name: str, described: object) -> Task:
    """Return the task that params.yaml declares (settings and data root), or that a manifest keeps (a definition)."""
    if isinstance(described, Mapping):
        settings = validate(TaskFile, dict(described), f"the definition of {name}")
        return FileTask.of(name, Completed(settings, ()))
    given, root = cast(tuple[TaskFile, Path], described)
    path = root / given.file
    marks = tuple(stamp(part.file) for part in parts(path)) if path.exists() else ()
    return _declared(name, given.model_dump_json(), str(root), marks)


@lru_cache(maxsize=64)
def _declared(name: str, given: str, root: str, marks: tuple[Any, ...]) -> Task:
    del marks
    return FileTask.of(name, completed(name, TaskFile.model_validate_json(given), Path(root)))


tasks.build = _built
