"""What docs/architecture.md says of the modules, held against their imports."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

from tests.conftest import ROOT


def test_no_modules_import_each_other_in_a_circle_not_even_inside_functions_or_for_types_alone():
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "pipeline").rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    imports: dict[str, set[str]] = {}
    for module, path in modules.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                named |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
                named -= {node.module} if all(f"{node.module}.{a.name}" in modules for a in node.names) else set()
            elif isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
        imports[module] = (named & modules.keys()) - {module}
    assert len(imports) > 100
    assert list(TopologicalSorter(imports).static_order())  # raises CycleError, which names the circle
