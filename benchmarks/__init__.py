"""`hificl bench VERB`: one module a verb, each with `run(device) -> dict`; the results lie beside them."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import time
from pathlib import Path
from typing import Any

from pipeline.core.errors import InputError, nearest


def verbs() -> list[str]:
    """Return what can be measured."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def run(verb: str, *, device: str | None = None, save: bool = False, **given: Any) -> dict[str, Any]:
    """Measure `verb` and return its ratios, spread, sizes, versions and the seconds that it took.

    Args:
        verb: which one.
        device: cpu or cuda; None: the verb's own, which is cpu for all but `cuda`.
        save: also write `benchmarks/<verb>-<device>.json`.
        given: further arguments of the verb; None leaves one out.

    Raises:
        InputError: no such verb, or an argument that it does not take.
    """
    if verb not in verbs():
        raise InputError(f"unknown benchmark '{verb}'", way_out=nearest(verb, verbs()))
    module = importlib.import_module(f"{__name__}.{verb}")
    device = device or getattr(module, "DEVICE", "cpu")
    arguments = {name: value for name, value in given.items() if value is not None}
    taken = inspect.signature(module.run).parameters
    for name in arguments:
        if name not in taken:
            raise InputError(f"bench {verb} takes no --{name}", way_out="hificl bench cuda does")
    started = time.monotonic()
    result = module.run(device=device, **arguments)
    result["took_seconds"] = round(time.monotonic() - started, 1)
    if save:
        path = Path("benchmarks") / f"{verb}-{device}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1, sort_keys=True, default=str) + "\n", encoding="utf-8")
    return result


def table(folder: Path | str = "benchmarks", *, into: Path | str | None = None) -> str:
    """Return the saved results as Markdown.

    Args:
        folder: of the results.
        into: a document that is also brought up to date, between its two marks.

    Raises:
        InputError: there are none, or the document has no marks.
    """
    from benchmarks.support.table import render, write_into

    if into is not None:
        write_into(Path(into), Path(folder))
    return render(Path(folder))
