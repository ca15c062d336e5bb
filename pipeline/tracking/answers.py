"""A table of some of a trial's answers with their pictures, in the layout of MLflow's `log_table`.

`log_table` itself adds rows to a table that is there, so that a score that is logged again would double it, and keeps
every picture twice.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.images import open_image
from pipeline.errors import InputError
from pipeline.rounding import rounded

FILE, IMAGES = "answers.json", "table_images/answers"
TAG = {"mlflow.loggedArtifacts": json.dumps([{"path": FILE, "type": "table"}])}
SAMPLES = 16  # of an evaluation, evenly spread over it: the same ones for all trials of a task
_SIDE, _TEXT = 128, 600  # pixels of a thumbnail, characters of a text: at most 0.3 MB a table
_COLUMNS = ("sample", "image", "answer", "references", "score", "question")  # answers are compared first, by sample


def write(record: Mapping[str, Any], project: Path, out: Path) -> bool:
    """Write the table of an evaluation and its thumbnails below `out`; return whether it has answers at all.

    Args:
        record: the evaluation's, with its predictions.
        project: what paths of pictures are relative to. A picture that is gone leaves its cell empty.
        out: a folder.
    """
    every = record.get("predictions") or []
    if not every:
        return False
    number = min(SAMPLES, len(every))
    rows = []
    for index in range(number):
        one = every[index * len(every) // number]
        score = one.get("score")
        rows.append([
            str(one["sample_id"]), _picture(project / one["image"], index, out), _short(one["prediction"]),
            _short("; ".join(dict.fromkeys(one.get("references") or []))), None if score is None else rounded(score),
            _short(one.get("question")),
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
    try:
        image = open_image(path)
    except InputError:
        return None
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= _TEXT else f"{text[: _TEXT - 1]}…"
