"""benchmarks/*.json as Markdown: each result as a table, and what was set out for beside what was reached."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.core import plain_yaml
from pipeline.core.errors import InputError, validate
from pipeline.core.files import fill

OPEN, CLOSE = "<!-- measured: written by `make bench` -->", "<!-- end of what was measured -->"
MARKS = re.compile(
    rf"(?P<open><!-- measured( (?P<verb>\w+))?: written by `make bench` -->)\n.*?(?P<close>{CLOSE})", re.DOTALL
)


GOALS = Path(__file__).resolve().parents[1] / "goals.yaml"


class _Goal(BaseModel):
    """A ratio of a result, and what it is meant to be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: str
    result: str
    ratio: str
    at_least: float | None = None
    at_most: float | None = None


def render(folder: Path, verb: str = "*") -> str:
    """Return one Markdown section a file, in order of the names: its ratios, growth, machine and method.

    Args:
        folder: of the results.
        verb: whose results; all by default.

    Raises:
        InputError: there is nothing to show, or a file that no verb wrote.
    """
    paths = sorted(folder.glob(f"{verb}.json" if verb == "*" else f"{verb}-*.json"))
    if not paths:
        raise InputError("no results", where=str(folder), way_out="Run hificl bench VERB --save, or make bench")
    return "\n\n".join(_section(path) for path in paths)


def write_into(path: Path, folder: Path) -> None:
    """Replace what stands between the two marks of a document by `render(folder)`.

    A first mark that names a verb, `<!-- measured faults: ...`, has that verb's results alone; `goals` has `goals`.

    Raises:
        InputError: the document is missing or has no marks, or as `render`.
    """
    way_out = f"Add lines {OPEN} and {CLOSE}, one below the other"
    fill(
        path,
        MARKS,
        way_out,
        lambda match: goals(folder) if match["verb"] == "goals" else render(folder, match["verb"] or "*"),
    )


def goals(folder: Path, file: Path = GOALS) -> str:
    """Return a Markdown table of what was set out for, what was reached, and whether that is enough.

    Args:
        folder: of the results.
        file: the goals.

    Raises:
        InputError: a goal is none, or a result is no verb's.
    """
    lines = ["| what | asked | reached | |", "|---|---:|---:|---|"]
    for number, raw in enumerate(plain_yaml.read_file(file)):
        goal = validate(_Goal, raw, f"{file}:{number + 1}", noun="field")
        path = folder / f"{goal.result}.json"
        value = _read(path)[1].get(goal.ratio) if path.exists() else None
        low, high = goal.at_least, goal.at_most
        if (low is None) == (high is None):
            raise InputError("needs at_least or at_most", where=f"{file}:{number + 1}")
        asked = f"≥ {low:g}" if low is not None else f"≤ {high:g}"
        met = value is not None and (value >= low if low is not None else value <= (high or 0.0))
        verdict = "not measured" if value is None else "reached" if met else "**missed**"
        lines.append(
            f"| {goal.what} (`{goal.ratio}`) | {asked} | {'-' if value is None else _number(value)} | {verdict} |"
        )
    return "\n".join(lines)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, float], dict[str, Any]]:
    """Return a result, its ratios and their spread."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return result, result["ratios"], result["spread"]
    except (OSError, ValueError, KeyError, TypeError):
        way_out = "Remove it, or measure again"
        raise InputError("not a result of hificl bench", where=str(path), way_out=way_out) from None


def _section(path: Path) -> str:
    result, ratios, spread = _read(path)
    lines = [f"### {path.stem}", "", "| what | value | quartiles |", "|---|---|---|"]
    lines += [f"| {name} | {_number(value)} | {_spread(spread.get(name))} |" for name, value in sorted(ratios.items())]
    for name, row in sorted((result.get("growth") or {}).items()):
        lines += ["", f"{name}: " + ", ".join(f"{key}: {_number(value)}" for key, value in row.items())]
    for label in ("wrong", "failed", "skipped"):
        lines += ["", *(f"- {label}: {_plain(row)}" for row in result[label])] if result.get(label) else []
    lines += ["", f"*{result.get('method', '')}*", "", _machine(result)]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _plain(row: Any) -> str:
    return ", ".join(f"{key} {_number(value)}" for key, value in row.items()) if isinstance(row, dict) else str(row)


def _spread(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_number(part) for part in value)
    return "" if value is None else f"range {_number(value)} of the median"


def _machine(result: dict[str, Any]) -> str:
    machine, versions = result.get("machine", {}), result.get("versions", {})
    parts = [
        machine.get("gpu") or f"{machine.get('cpu_count')} CPU cores",
        f"driver {machine['driver']}" if machine.get("driver") else "",
        f"{machine['threads']} thread(s)" if "threads" in machine else "",
        ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        f"commit {result['commit']}" if result.get("commit") else "",
        f"load average at the end {machine['load_average'][0]:.1f}" if machine.get("load_average") else "",
        f"took {result['took_seconds']:.0f} s" if "took_seconds" in result else "",
    ]
    return "Measured with " + "; ".join(part for part in parts if part) + "."
