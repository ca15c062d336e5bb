"""What a sweep's own processes may import: each start of one costs these seconds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "not_needed"),
    [("stages.train", "ray transformers deepspeed"), ("pipeline.pool.tuner", "mlflow transformers deepspeed")],
)
def test_the_stage_and_the_driver_import_what_they_need(module: str, not_needed: str) -> None:
    """In a process of its own: this one has imported everything."""
    code = f"import {module}, sys; print(*[name for name in '{not_needed}'.split() if name in sys.modules])"
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert said.split() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("commands", "not_needed"),
    [
        (["--help"], "torch rich yaml numpy pydantic ruamel transformers mlflow ray argcomplete"),
        (["where"], "torch rich numpy pydantic ruamel"),
        (["tasks"], "torch rich"),
        # a method's options stand beside its modules
        (["studies", "methods", "backbones", "trials"], "ray mlflow transformers deepspeed matplotlib"),
    ],
)
def test_a_command_that_lists_imports_what_it_needs(commands: list[str], not_needed: str) -> None:
    code = (
        "import contextlib, io, sys; from pipeline.cli import main\n"
        f"for command in {commands}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main([command])\n"
        f"    print(*[f'{{command}}: {{name}}' for name in '{not_needed}'.split() if name in sys.modules], sep='\\n')"
    )
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert said.split() == []


@pytest.mark.parametrize(("given", "asked"), [(None, "AUTO,STRICT"), ("AVX2", "AVX2")])
def test_whoever_imports_the_package_has_products_that_do_not_depend_on_the_place_in_memory(given, asked) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    environment |= {} if given is None else {"MKL_CBWR": given}
    code = "import pipeline, os; print(os.environ['MKL_CBWR'])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True, env=environment).split() == [
        asked
    ]
