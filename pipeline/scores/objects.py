"""Which objects an image shows: the categories of its instances, from the official instances files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from pipeline.digests import stamp
from pipeline.errors import InputError
from pipeline.scores.files import id_field, printable, read_json, record_list, text_field

# What names the miniature's objects, whose words are no English; the form is that of CHAIR's own list.
MINIATURE_WORDS = Path(__file__).with_name("data") / "miniature_synonyms.txt"


def categories_of(paths: Iterable[str | Path]) -> dict[str, list[str]]:
    """Return {image id: names of its instances' categories}; an image without instance has an empty list.

    Raises:
        InputError: a file is missing, damaged or of another shape.
    """
    categories: dict[str, list[str]] = {}
    for path in map(Path, paths):
        for key, names in _categories(path, _stamp(path)).items():
            categories.setdefault(key, []).extend(names)
    return categories


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
        for number, row in enumerate(record_list(content, "categories", str(path)))
    }
    categories_by_image: dict[str, list[str]] = {
        id_field(row, "id", f"{path}, image {number}"): []
        for number, row in enumerate(record_list(content, "images", str(path)))
    }
    for number, row in enumerate(record_list(content, "annotations", str(path))):
        place = f"{path}, annotation {number}"
        category = id_field(row, "category_id", place)
        if category not in names:
            raise InputError(
                f"category_id {printable(category)} is not among the categories", where=place, way_out="Correct it"
            )
        categories_by_image.setdefault(id_field(row, "image_id", place), []).append(names[category])
    # CHAIR asks only which categories are there: the repeats would be most of what the cache holds.
    return {key: tuple(dict.fromkeys(categories)) for key, categories in categories_by_image.items()}
