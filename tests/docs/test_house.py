"""What docs/architecture.md says of the modules, held against the code; figures of the house that only get better."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from tests.conftest import ROOT

MOST_FILES = 200  # fewer than these
MOST_LINES = 600  # of one file
MOST_UNTYPED = 11  # functions that return dict[str, Any]
MOST_PRONOUNS = 8  # as names of variables; those left are words of a record, or an error's
PRONOUNS = {"one", "mine", "found", "its", "where", "what", "they", "theirs", "other", "own"}
REPEATED = 8  # lines, one after another


@cache
def sources() -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "pipeline").rglob("*.py"))}


@cache
def nodes() -> dict[Path, list[ast.AST]]:
    return {path: list(ast.walk(ast.parse(text))) for path, text in sources().items()}


def test_no_modules_import_each_other_in_a_circle_not_even_inside_functions_or_for_types_alone():
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in nodes()
    }
    imports: dict[str, set[str]] = {}
    for module, path in modules.items():
        named = set()
        for node in nodes()[path]:
            if isinstance(node, ast.ImportFrom) and node.module:
                named |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
                named -= {node.module} if all(f"{node.module}.{a.name}" in modules for a in node.names) else set()
            elif isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
        imports[module] = (named & modules.keys()) - {module}
    assert len(imports) > 100
    assert list(TopologicalSorter(imports).static_order())  # raises CycleError, which names the circle


def test_the_map_names_every_room_and_only_files_that_are_there():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / "pipeline").glob("*/__init__.py")}
    assert rooms and {room for room in rooms if f"\n    {room}/ " not in page} == set()
    named = set(re.findall(r"`([a-z_/]+\.py)`", page))
    assert (
        named and {name for name in named if not any((ROOT / at / name).is_file() for at in ("", "pipeline"))} == set()
    )


def test_the_house_has_few_files_and_none_that_is_long():
    assert 100 < len(sources()) < MOST_FILES
    long = {path.name: text.count("\n") for path, text in sources().items() if text.count("\n") > MOST_LINES}
    assert not long


def test_functions_return_types_and_not_mappings_of_anything():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    untyped = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path, of_file in nodes().items()
        for node in of_file
        if isinstance(node, functions) and node.returns is not None and "dict[str, Any]" in ast.unparse(node.returns)
    ]
    assert len(sources()) > 100 and len(untyped) <= MOST_UNTYPED, untyped


def test_variables_are_named_by_nouns():
    pronouns = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.id}"
        for path, of_file in nodes().items()
        for node in of_file
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in PRONOUNS
    ]
    assert len(sources()) > 100 and len(pronouns) <= MOST_PRONOUNS, pronouns


def test_nothing_is_written_twice():
    seen: Counter[tuple[str, ...]] = Counter()
    for text in sources().values():
        lines = [line.strip() for line in text.splitlines()]
        seen.update(
            window for window in zip(*(lines[start:] for start in range(REPEATED)), strict=False) if all(window)
        )
    twice = ["\n".join(window) for window, times in seen.items() if times > 1]
    assert len(seen) > 1000 and not twice
