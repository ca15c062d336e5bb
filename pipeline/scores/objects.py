"""Which objects an image shows: the categories of its instances, from the official instances files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from pipeline.digests import stamp
from pipeline.errors import InputError
from pipeline.scores.files import id_field, read_json, section, shown, text_field

# What names the miniature's objects, whose words are no English; the form is that of CHAIR's own list.
MINIATURE_WORDS = Path(__file__).with_name("data") / "miniature_synonyms.txt"


def categories_of(paths: Iterable[str | Path]) -> dict[str, list[str]]:
    """Return {image id: names of its instances' categories}; an image without instance has an empty list.

    Raises:
        InputError: a file is missing, damaged or of another shape.
    """
    found: dict[str, list[str]] = {}
    for path in map(Path, paths):
        for key, names in _categories(path, _stamp(path)).items():
            found.setdefault(key, []).extend(names)
    return found


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        return stamp(path)
    except OSError:
        return ()  # reading it says what is wrong


# A process scores many trials against the same file, and COCO's takes seconds to read; a replaced file is read again.
@lru_cache(maxsize=2)
def _categories(path: Path, mark: tuple[int, ...]) -> Mapping[str, tuple[str, ...]]:
    del mark
    content = read_json(path)
    names = {
        id_field(row, "id", f"{path}, category {number}"): text_field(row, "name", f"{path}, category {number}")
        for number, row in enumerate(section(content, "categories", str(path)))
    }
    found: dict[str, list[str]] = {
        id_field(row, "id", f"{path}, image {number}"): []
        for number, row in enumerate(section(content, "images", str(path)))
    }
    for number, row in enumerate(section(content, "annotations", str(path))):
        where = f"{path}, annotation {number}"
        category = id_field(row, "category_id", where)
        if category not in names:
            raise InputError(
                f"category_id {shown(category)} is not among the categories", where=where, way_out="Correct it"
            )
        found.setdefault(id_field(row, "image_id", where), []).append(names[category])
    # CHAIR asks only which categories are there: the repeats would be most of what the cache holds.
    return {key: tuple(dict.fromkeys(categories)) for key, categories in found.items()}
