"""hificl-lab: adapt a frozen multimodal model by approximating in-context learning.

In a checkout this package is `pipeline`. As a library (in a wheel, or inside a model that MLflow keeps) it is `hificl`,
so that it takes no common name from its surroundings. A checkout knows that name too, for the same modules: what
imports `hificl.adapters` runs in both.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

# Before torch's first product: on Intel's AVX-512 MKL sums a row of a product in another order where fewer than 16 rows
# stand in it, and a trial in a pack, or one that goes on from a step, would not have the bits that it has alone.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

CHECKOUT, LIBRARY = "pipeline", "hificl"
PACKAGE = __name__  # which of the two these modules have, for `python -m`


def as_library(source: str) -> str:
    """Return the source of one of these modules as it stands in the library: what it imports is called `hificl`.

    Raises:
        ValueError: it imports `pipeline.x` by a statement that binds `pipeline`.
    """
    import ast

    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias for alias in node.names if alias.name.partition(".")[0] == CHECKOUT]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == CHECKOUT:
            names = [ast.alias(node.module or "", asname="from", lineno=node.lineno, col_offset=node.col_offset)]
        else:
            continue
        for alias in reversed(names):  # from the end of a line: places before stay as they are
            bound = "" if alias.asname else f" as {CHECKOUT}"
            if bound and alias.name != CHECKOUT:
                raise ValueError(f"line {alias.lineno}: `import {alias.name}` binds the name {CHECKOUT}")
            line = lines[alias.lineno - 1].encode()
            before, after = line[: alias.col_offset].decode(), line[alias.col_offset :].decode()
            lines[alias.lineno - 1] = before + after.replace(CHECKOUT, LIBRARY + bound, 1)
    return "\n".join(lines)


class _BothNames(MetaPathFinder, Loader):
    """Gives `hificl.x` as the module `pipeline.x`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != LIBRARY:
            return None
        return ModuleSpec(
            fullname, self, loader_state=import_module(CHECKOUT + fullname.removeprefix(LIBRARY)).__spec__
        )

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.loader_state.name]

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state  # the import system has put the other name's there


if __name__ == CHECKOUT:
    sys.meta_path.insert(0, _BothNames())
elif Path(__file__).parent.name == CHECKOUT:  # a checkout's, which `pip install -e` offers as `hificl`
    sys.modules[__name__] = import_module(CHECKOUT)
