"""A table of some of a trial's answers with their pictures, in the layout of MLflow's `log_table`.

`log_table` itself adds rows to a table that is there, so that a score that is logged again would double it, and keeps
every picture twice.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.images import thumbnail
from pipeline.records.evaluation import Prediction
from pipeline.tracking.records import rounded

FILE, IMAGES = "answers.json", "table_images/answers"
TAG = {"mlflow.loggedArtifacts": json.dumps([{"path": FILE, "type": "table"}])}
SAMPLES = 16  # of an evaluation, evenly spread over it: the same ones for all trials of a task
_SIDE, _TEXT = 128, 600  # pixels of a thumbnail, characters of a text: at most 0.3 MB a table
_COLUMNS = ("sample", "image", "answer", "references", "score", "question")  # answers are compared first, by sample


def write_answers(predictions: Sequence[Prediction], project: Path, out: Path) -> bool:
    """Write the table of an evaluation and its thumbnails below `out`; return whether it has answers at all.

    Args:
        predictions: the evaluation's.
        project: what paths of pictures are relative to. A picture that is gone leaves its cell empty.
        out: a folder.
    """
    number = min(SAMPLES, len(predictions))
    if number == 0:
        return False
    rows = []
    for index in range(number):
        answer = predictions[index * len(predictions) // number]
        picture = _picture(project / answer.image, index, out) if answer.image else None
        rows.append([
            str(answer.sample_id), picture, _short(answer.prediction),
            _short("; ".join(dict.fromkeys(answer.references))),
            None if answer.score is None else rounded(answer.score), _short(answer.question),
        ])  # fmt: skip
    (out / FILE).write_text(json.dumps({"columns": _COLUMNS, "data": rows}, ensure_ascii=False), encoding="utf-8")
    return True


def _picture(path: Path, number: int, out: Path) -> dict[str, str] | None:
    data = _thumbnail(path)
    if data is None:
        return None
    name = f"{IMAGES}/{number:02d}.webp"
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_bytes(data)
    return {"type": "image", "filepath": name, "compressed_filepath": name}


@functools.lru_cache(maxsize=256)
def _thumbnail(path: Path) -> bytes | None:
    return thumbnail(path, _SIDE, "WEBP", quality=80)


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= _TEXT else f"{text[: _TEXT - 1]}…"
