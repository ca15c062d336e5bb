"""A file of the user's own: what its columns are, guessed where it is not said, and a row of it as a sample."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from pathlib import Path
from string import Formatter, ascii_uppercase
from typing import Any

from pipeline.config.schema import ScoreName, TaskFields, TaskFile, TaskSplit
from pipeline.core.errors import InputError, nearest
from pipeline.data.rows import SPLIT_NAMES, Part, Row, parts, read
from pipeline.data.sample import ImageRef, Sample
from pipeline.tasks.caption_files import one_line
from pipeline.tasks.choice_files import letter_of, with_choices
from pipeline.tasks.vqa import most_frequent

ROW_NUMBER = "#"  # as a column: the row's number
OF_FILE = "#file"  # as a split's column: what the file's or folder's name says
DRAWN = "drawn"
HEAD = 200  # rows that are looked at to guess
LEAST_ANSWERS = 4  # of VQA accuracy: with fewer no answer can be right in full
_LONGEST_NAME = 255  # bytes of one that a file system takes
_SHOWN = 60  # characters of a value in a message
_LONG, _MOST_TOKENS = 5, 128  # words of an answer that asks for more new tokens than is usual; and how many at most
_NAMES: Mapping[str, tuple[str, ...]] = {  # what columns are called, the likeliest first
    "id": ("id", "question_id", "sample_id", "qid", "uid"),
    "question": ("question", "query", "input", "instruction", "prompt", "problem"),
    "answer": ("answer", "output", "response", "completion", "target", "label", "solution"),
    "answers": ("answers", "references"),
    "image": ("image", "images", "image_path", "image_paths", "file_name", "filename", "img", "picture"),
    "caption": ("caption", "captions", "text", "sentences"),
    "choices": ("choices", "options"),
    "messages": ("messages", "conversations", "conversation"),
    "group": ("group", "group_id", "image_id"),
}
_SPLIT_COLUMNS = ("split", "fold", "subset", "partition")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")
_ROLES = {"human": "user", "gpt": "assistant"}
_CLOSING = "Answer with the option's letter from the given choices directly."


class RowError(Exception):
    """Why a row cannot be used: which column, and what is wrong with it."""

    def __init__(self, column: str, what: str) -> None:
        self.column, self.what = column, what
        super().__init__(f"field '{column}' {what}" if column else what)


@dataclass(frozen=True)
class Completed:
    """Settings with nothing left to guess, and what was guessed, in words."""

    settings: TaskFile
    guessed: tuple[str, ...]


def completed(name: str, given: TaskFile, root: Path) -> Completed:
    """Return the settings with what they leave out, guessed from the first rows.

    Settings that leave out nothing stand for themselves where the file is not here: what is planned needs no row.

    Args:
        name: the task's.
        given: as the user wrote them.
        root: the data root.

    Raises:
        InputError: no such file, or no column for what is needed; the columns that there are are listed.
    """
    path = root / given.file
    for key, place in (("file", given.file), ("images", given.images or "")):
        if os.path.relpath(root / place, root).startswith(".."):
            way_out = "Set the profile's data_root to a folder above it, or link it below"
            raise InputError(
                f"'{place}' lies outside the data root '{root}'", where=f"tasks.{name}.{key}", way_out=way_out
            )
    if not path.exists() and _says_all(given):
        return Completed(given, ())
    files = parts(path)
    head = list(islice(chain.from_iterable(map(read, files)), HEAD))
    whole = [row for row in head if not row.problem]
    where = f"tasks.{name}"
    if not whole:
        problem = f"line {head[0].line} {head[0].problem}" if head else "the file has no rows"
        raise InputError(
            problem, where=str(head[0].file if head else path), way_out="Give a file of samples, a row each"
        )
    columns = list(dict.fromkeys(chain.from_iterable(row.values for row in whole)))
    fields, guessed = _fields(given.fields, columns, whole, where, str(path))
    score = given.score or _score(fields, whole)
    longest = max((_words(fields, row) for row in whole), default=0)
    usual = 20 if score == "cider" else 10
    tokens = given.max_new_tokens or (usual if longest <= _LONG or score == "cider" else min(4 * longest, _MOST_TOKENS))
    split = _split(given.split, files, columns, where, whole)
    pictured = bool(fields.image) or any(_chat_images(fields, row) for row in whole)
    prompt = given.prompt or _prompt(fields, pictured)
    _check_prompt(prompt, fields, pictured, columns, where)
    settled = {"score": score, "max_new_tokens": tokens, "split": split, "prompt": prompt}
    shown = {**settled, "split": split if isinstance(split, str) else f"by column '{split.column}'"}
    guessed += [f"{key} = {shown[key]}" for key in settled if getattr(given, key) is None]
    said = chain.from_iterable([value] if isinstance(value, str) else value or () for _, value in fields)
    used = {*said, *placeholders(prompt), *((split.column,) if isinstance(split, TaskSplit) else ())}
    if unused := [column for column in columns if column not in used]:
        guessed.append(f"not used: {_quoted(unused)}")
    return Completed(given.model_copy(update={**settled, "fields": fields}), tuple(guessed))


def _says_all(given: TaskFile) -> bool:
    """Whether settings say what would be guessed else, but for columns that a file need not have."""
    drawn = given.split == DRAWN or isinstance(given.split, TaskSplit)
    said = given.score and given.prompt and given.max_new_tokens and (given.fields.answer or given.fields.answers)
    return bool(drawn and said)


def _fields(
    given: TaskFields, columns: Sequence[str], rows: Sequence[Row], where: str, file: str
) -> tuple[TaskFields, list[str]]:  # fmt: skip
    """Return the columns that hold each field, and what was guessed of them."""
    small = {column.lower(): column for column in reversed(columns)}
    said = {key: value for key, value in given.model_dump().items() if value is not None}
    for key, value in said.items():
        for column in [value] if isinstance(value, str) else value:
            if column not in columns and column != ROW_NUMBER:
                raise InputError(
                    f"column '{column}' is not in {file}",
                    where=f"{where}.fields.{key}",
                    way_out=nearest(column, columns),
                )
    taken = set(chain.from_iterable([value] if isinstance(value, str) else value for value in said.values()))
    free = {
        key: [small[name] for name in names if small.get(name, "") not in taken | {""}] for key, names in _NAMES.items()
    }
    guess: dict[str, str | list[str]] = {
        key: free[key][0] for key in ("id", "image", "choices", "group") if key not in said and free[key]
    }
    if "choices" not in {**said, **guess} and len(lettered := _lettered(columns, taken)) > 1:
        guess["choices"] = lettered
    if "messages" not in said and free["messages"] and not {"question", "answer", "answers"} & said.keys():
        guess["messages"] = free["messages"][0]
    if "messages" not in {**said, **guess}:
        guess |= {key: free[key][0] for key in ("question", "caption") if key not in said and free[key]}
        if not {"answer", "answers"} & said.keys():
            kind = next((key for key in ("answers", "answer") if free[key]), None)
            guess |= {kind: free[kind][0]} if kind else {}
    every = {**said, **guess}
    if "answer" in every and isinstance(rows[0].values.get(str(every["answer"])), list | dict):  # several, all the same
        every["answers"] = every.pop("answer")
        guess = {key: every[key] for key in every if key not in said}
    if not {"answer", "answers", "messages", "caption"} & every.keys():
        raise InputError(
            f"no column was found that holds the answers; there are {', '.join(columns)}", where=file,
            way_out=f"Say which: {where}.fields: {{question: COLUMN, answer: COLUMN}}, or caption: COLUMN "
            "(adapt: --field question=COLUMN --field answer=COLUMN)",
        )  # fmt: skip
    every.setdefault("id", ROW_NUMBER)
    named = {key: [columns] if isinstance(columns, str) else columns for key, columns in guess.items()}
    return TaskFields(**every), [f"{key} = column {_quoted(names)}" for key, names in named.items()]


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _lettered(columns: Sequence[str], taken: Iterable[object]) -> list[str]:
    """Return the columns A, B, C and so on, which hold a choice each."""
    free = set(columns).difference(taken)  # type: ignore[arg-type]
    return list(takewhile(lambda letter: letter in free, ascii_uppercase))


def _score(fields: TaskFields, rows: Sequence[Row]) -> ScoreName:
    if fields.choices:
        return "choice"
    if fields.caption and not (fields.answer or fields.answers or fields.messages):
        return "cider"
    if fields.answers:
        cells = [_parsed(row.values.get(fields.answers)) for row in rows]
        counts = sorted(len(cell) if isinstance(cell, list) else 1 for cell in cells)
        weighted = any(
            isinstance(cell, dict)
            or (isinstance(cell, list) and any(isinstance(entry, dict) and "weight" in entry for entry in cell))
            for cell in cells
        )
        return "vqa" if weighted or counts[len(counts) // 2] >= LEAST_ANSWERS else "exact"
    values = [str(row.values.get(fields.answer or "", "")) for row in rows]
    return "number" if all(_NUMBER.fullmatch(value.strip()) for value in values) else "exact"


def _words(fields: TaskFields, row: Row) -> int:
    value = _parsed(row.values.get(fields.answers or fields.answer or fields.caption or ""))
    entries = value if isinstance(value, list) else list(value) if isinstance(value, dict) else [value]
    first = entries[0] if entries else ""
    return len(str(first.get("answer", "") if isinstance(first, dict) else first).split())


def _split(
    given: str | TaskSplit | None, files: Sequence[Part], columns: Sequence[str], where: str, rows: Sequence[Row]
) -> str | TaskSplit:  # fmt: skip
    if isinstance(given, TaskSplit) or given == DRAWN:
        column = given.column if isinstance(given, TaskSplit) else ""
    else:
        known = set(chain.from_iterable(SPLIT_NAMES.values()))  # a fold's number says no split
        by_name = [
            column
            for column in columns
            if column.lower() in _SPLIT_COLUMNS and any(str(row.values.get(column)).lower() in known for row in rows)
        ]
        in_files = len({part.split for part in files}) > 1
        column = given or (by_name[0] if by_name else OF_FILE if in_files else "")
    if column and column not in (*columns, OF_FILE):
        way_out = f"{nearest(column, columns)}; or split: {DRAWN} (adapt: --split {DRAWN})"
        raise InputError(f"column '{column}' is not there", where=f"{where}.split", way_out=way_out)
    if isinstance(given, TaskSplit) or not column:
        return given if isinstance(given, TaskSplit) else DRAWN
    named = {key: list(names) for key, names in SPLIT_NAMES.items()}
    if column == OF_FILE and not any(part.split in named["evaluation"] for part in files):
        named = {**named, "selection": [], "evaluation": named["selection"]}  # a validation split alone is evaluated
    return TaskSplit(column=column, **named)


def _chat_images(fields: TaskFields, row: Row) -> bool:
    """Tell whether a row's chat has pictures in it; one that cannot be read has none."""
    try:
        return bool(fields.messages and _chat(row.values.get(fields.messages), fields.messages).images)
    except RowError:
        return False


def _prompt(fields: TaskFields, pictured: bool) -> str:
    shown = ["Image: {image}"] if pictured else []
    asks = fields.question or fields.messages
    if not (fields.answer or fields.answers or fields.messages):
        return " ".join([*shown, "Caption:"])
    if fields.caption and not pictured:
        shown = ["Caption: {caption}"]
    return " ".join([*shown, *(["Question: {question}"] if asks else []), "Answer:"])


def placeholders(prompt: str) -> list[str]:
    """Return the names in braces, in order."""
    return [name for _, name, _, _ in Formatter().parse(prompt) if name is not None]


def _check_prompt(prompt: str, fields: TaskFields, pictured: bool, columns: Sequence[str], where: str) -> None:
    place = f"{where}.prompt"
    try:
        names = placeholders(prompt)
    except ValueError as error:
        raise InputError(f"'{prompt}': {error}", where=place, way_out="Write {{ and }} for braces themselves") from None
    known = (
        {key for key, value in fields if value is not None}
        | set(columns)
        | ({"question"} if fields.messages else set())
        | ({"image"} if pictured else set())
    )
    for name in names:
        if name not in known:
            raise InputError(f"{{{name}}} is neither a field nor a column", where=place, way_out=nearest(name, known))
    if prompt.rstrip().endswith("}") or not prompt.strip():
        way_out = "End it with the words that an answer follows, such as 'Answer:'"
        raise InputError(f"'{prompt}' ends with no words of its own", where=place, way_out=way_out)
    if "image" in names and (names.count("image") > 1 or names.index("image") not in (0, len(names) - 1)):
        way_out = "Put {image} before or behind the other fields, once; it stands for all images of a row"
        raise InputError("{image} stands between other fields, or twice", where=place, way_out=way_out)
    if pictured and "image" not in names:
        raise InputError("it has no {image}, the rows have images", where=place, way_out="Write {image} where they go")


@dataclass(frozen=True)
class RowReader:
    """What makes samples of rows.

    Attributes:
        task: the task's name.
        settings: complete.
        root: the data root, for images that are named by absolute paths.
        several: whether the data set has several files, so that a row's number is not enough of an id.
    """

    task: str
    settings: TaskFile
    root: Path
    several: bool

    def sample_id(self, row: Row) -> int | str:
        """Return a row's id."""
        column = self.settings.fields.id or ROW_NUMBER
        if column == ROW_NUMBER:
            return f"{self.shown(row.file)}:{row.line}" if self.several else row.line
        value = row.values.get(column)
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            raise RowError(column, f"is {short(value)}, an id is a whole number or text")
        return value

    def shown(self, file: Path) -> str:
        """Return what messages and ids call a file: its name, with the folders below the data set's own."""
        return file.relative_to(self.root / self.settings.file).as_posix() if self.several else file.name

    def split(self, row: Row) -> str:
        """Return `train`, `selection` or `evaluation`; nothing for a row of another split."""
        split = self.settings.split
        if not isinstance(split, TaskSplit):
            return "evaluation"  # the one pool of all
        value = row.split if split.column == OF_FILE else _text(row, split.column)
        lists = {"train": split.train, "selection": split.selection, "evaluation": split.evaluation}
        return next((key for key, values in lists.items() if value in values or value.lower() in values), "")

    def group(self, row: Row) -> str | None:
        """Return what keeps rows together, if anything does."""
        return _text(row, self.settings.fields.group) if self.settings.fields.group else None

    def sample(self, row: Row) -> Sample:
        """Return a row as a sample; its images have no digest yet.

        Raises:
            RowError: it cannot be used.
        """
        if row.problem:
            raise RowError("", row.problem)
        fields, values = self.settings.fields, row.values
        chat = _chat(values.get(fields.messages), fields.messages) if fields.messages else None
        images = self.images(row, chat.images if chat else ())
        question = chat.question if chat else _text(row, fields.question) if fields.question else None
        meta: dict[str, Any] = {}
        if chat:
            references: tuple[str, ...] = (chat.answer,)
        elif fields.answers:
            references, weights = self._answers(values.get(fields.answers), fields.answers)
            meta |= {"weights": weights} if weights else {}
        elif fields.answer:
            references = (_text(row, fields.answer),)
        else:
            references = self._answers(values.get(fields.caption or ""), fields.caption or "")[0]
        target = (
            one_line(references[0]) if meta.get("weights") else most_frequent([one_line(text) for text in references])
        )
        if self.settings.score == "choice":
            choices = self._choices(row)
            letter = _letter(target, choices, fields.answer or fields.answers or "")
            references, target = (letter,), letter
            meta |= {"question": question or "", "choices": choices}
            question = with_choices(question or "", choices, _CLOSING)
        elif self.settings.score == "number" and number_in(target) is None:
            raise RowError(fields.answer or fields.answers or "", f"is {short(target)}, which has no number")
        asked = self._asked(row, question)
        return Sample(self.task, self.sample_id(row), images, asked, target, references, meta)

    def images(self, row: Row, more: Iterable[str] = ()) -> tuple[ImageRef, ...]:
        """Return a row's images by their paths below the data root."""
        columns = self.settings.fields.image or ()
        out = []
        for column in [columns] if isinstance(columns, str) else columns:
            value = row.values.get(column)
            if value is None and self.settings.fields.messages:
                continue
            for path in value if isinstance(value, list) else [value]:
                out.append(self._image(row, path, column))
            if not value:
                raise RowError(column, "is missing" if column not in row.values else f"is {short(value)}")
        out += [self._image(row, path, self.settings.fields.messages or "") for path in more]
        return tuple(map(ImageRef, out))

    def _image(self, row: Row, value: object, column: str) -> str:
        path = value.get("path") if isinstance(value, dict) else value
        if not isinstance(path, str) or not path or "\0" in path:
            raise RowError(column, f"is {short(value)}, an image's path is needed")
        if path.startswith(("http://", "https://", "data:")):
            raise RowError(column, f"is {short(path)}: save the picture as a file, and give its path")
        if len(path) > _LONGEST_NAME and any(len(name.encode()) > _LONGEST_NAME for name in re.split(r"[/\\]", path)):
            raise RowError(column, f"is {short(path)}, no path: save the picture as a file, and give its path")
        base = row.file.parent
        if self.settings.images is not None and not path.startswith(f"{row.file.name}#"):
            base = self.root / self.settings.images
        below = os.path.relpath(os.path.normpath(base / path), self.root)
        if "\\" in path and not os.path.exists(self.root / below):  # as Windows writes paths
            return self._image(row, path.replace("\\", "/"), column)
        if below.startswith(".."):
            raise RowError(
                column,
                f"is {short(path)}, which lies outside the data root {self.root}; it has to be a folder above both",
            )
        return below.replace(os.sep, "/")

    def _answers(self, value: object, column: str) -> tuple[tuple[str, ...], list[float]]:
        value = _parsed(value)
        entries = value if isinstance(value, list) else [value]
        if isinstance(value, dict):
            entries = [{"answer": answer, "weight": weight} for answer, weight in value.items()]
        texts, weights = [], []
        for entry in entries:
            weight = entry.get("weight") if isinstance(entry, dict) else None
            text = entry.get("answer") if isinstance(entry, dict) else entry
            if text == "" and len(entries) > 1:  # an annotator who gave none
                continue
            if isinstance(text, bool) or not isinstance(text, str | int | float) or not str(text).strip():
                raise RowError(column, f"is {short(value)}, a text, a list of texts or {{answer: weight}} is needed")
            if weight is not None and (not isinstance(weight, int | float) or not 0 <= weight <= 1):
                raise RowError(column, f"has weight {short(weight)}, a number from 0 to 1 is needed")
            texts.append(str(text))
            weights += [] if weight is None else [float(weight)]
        if not texts or len(weights) not in (0, len(texts)):
            raise RowError(column, "has no answer" if not texts else "has a weight for some answers alone")
        if self.settings.score == "vqa" and not weights and len(texts) < LEAST_ANSWERS:
            problem = f"has {len(texts)} answers; VQA accuracy needs {LEAST_ANSWERS} or weights"
            raise RowError(column, f"{problem}. Set score: exact (adapt: --score exact)")
        order = sorted(range(len(texts)), key=lambda i: -weights[i]) if weights else range(len(texts))
        return tuple(texts[i] for i in order), [weights[i] for i in order] if weights else []

    def _choices(self, row: Row) -> list[str]:
        columns = self.settings.fields.choices or ""
        if isinstance(columns, list):
            filled = [column for column in columns if row.values.get(column) not in (None, "")]
            if len(filled) < 2 or filled != columns[: len(filled)]:
                raise RowError(next(name for name in columns if name not in filled), "is empty before another choice")
            return [_text(row, column) for column in filled]  # a question may have fewer than others
        value = _parsed(row.values.get(columns))
        if isinstance(value, str):
            value = value.split("|")
        texts = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(texts, list) or not 2 <= len(texts) <= len(ascii_uppercase):
            raise RowError(columns, f"is {short(value)}, a list of 2 to {len(ascii_uppercase)} choices is needed")
        return [str(text).strip() for text in texts]

    def _asked(self, row: Row, question: str | None) -> str | None:
        """Return what stands between the prompt's first and last name of a field, the images left out."""
        middle = inner(self.settings.prompt or "")
        if not middle:
            return None
        names = placeholders(middle)
        if middle == "{question}":
            return question
        said = {key: column for key, column in self.settings.fields if isinstance(column, str)}
        known = {name: _text(row, said.get(name, name)) for name in names if name != "question"}
        return middle.format(**known, **({"question": question or ""} if "question" in names else {}))


def inner(prompt: str) -> str:
    """Return a prompt from its first name of a field to its last, but for `{image}`; empty: there is none."""
    names = [name for name in placeholders(prompt) if name != "image"]
    if not names:
        return ""
    start, last = prompt.index(f"{{{names[0]}}}"), f"{{{names[-1]}}}"
    return prompt[start : prompt.rindex(last) + len(last)]


@dataclass(frozen=True)
class _Chat:
    question: str
    answer: str
    images: tuple[str, ...]


def _chat(value: object, column: str | None) -> _Chat:
    """Return a chat's last answer, all that was said before as the question, and its images."""
    column, turns = column or "", _parsed(value)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(column, f"is {short(value)}, a list of turns with role and content is needed")
    texts, images = [], list[str]()
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = _ROLES.get(str(role), str(role))
        if role not in ("system", "user", "assistant"):
            raise RowError(column, f"has a turn of role {short(role)}; system, user and assistant are known")
        said = []
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                said.append(part["text"])
            elif kind in ("image", "image_url"):
                named = [part.get(key) for key in ("image", "path", "url", "image_url")]
                named = [path.get("url") if isinstance(path, dict) else path for path in named]
                images += [str(path) for path in named if path is not None]
            else:
                raise RowError(column, f"has content {short(part)}; a part is text or an image")
        texts.append((role, " ".join(said).replace("<image>", " ").strip()))
    if texts[-1][0] != "assistant" or not texts[-1][1] or len(texts) < 2:
        raise RowError(column, "must end with what the assistant answers to somebody")
    return _Chat("\n".join(text for _, text in texts[:-1] if text), texts[-1][1], tuple(images))


def _text(row: Row, column: str | None) -> str:
    value = row.values.get(column or "")
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int | float) or not str(value).strip():
        missing = column not in row.values
        raise RowError(column or "", "is missing or empty" if missing else f"is {short(value)}, a text is needed")
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(column or "", f"is {value}, a text or a number is needed")
    text = str(value)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowError(column or "", "holds half a character (a lone surrogate)") from None
    return text


def _parsed(value: object) -> Any:
    """Return what a cell of CSV spells as JSON; anything else as it is."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _letter(answer: str, choices: Sequence[str], column: str) -> str:
    """Return the letter of a right choice, which a file may give by its text, its letter or its number from 0."""
    small = [choice.casefold() for choice in choices]
    if answer.strip().casefold() in small:
        return ascii_uppercase[small.index(answer.strip().casefold())]
    if answer.strip().isdecimal() and int(answer) < len(choices):
        return ascii_uppercase[int(answer)]
    letter = letter_of(answer) if len(answer.strip(" ().")) == 1 else ""
    if letter and letter in ascii_uppercase[: len(choices)]:
        return letter
    problem = f"is {short(answer)}: neither one of the {len(choices)} choices, nor its letter, nor its number from 0"
    raise RowError(column, problem)


def number_in(text: str) -> float | None:
    """Return the first number in a text; commas in it are of thousands."""
    number = _NUMBER.search(text)
    return None if number is None else float(number[0].replace(",", ""))


def short(value: object) -> str:
    """Return a value as a message shows it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
