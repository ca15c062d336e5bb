"""Every line of docs/adapters.md, run in its order beside the miniature's checkpoints."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline.cli import main
from tests.conftest import ROOT

PAGE = (ROOT / "docs/adapters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def page(tmp_path_factory: Any) -> dict[str, Any]:
    """Run the page in a folder of its own; return what its lines have made."""
    folder, names = tmp_path_factory.mktemp("page"), {"__name__": "page"}
    (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    Image.new("RGB", (32, 32), "red").save(folder / "photo.png")
    torch.set_num_threads(1)
    with contextlib.chdir(folder):
        for language, block in BLOCKS:
            if language == "python":
                exec(compile(block, "docs/adapters.md", "exec"), names)
                continue
            for line in block.replace("\\\n", " ").splitlines():
                program, *words = shlex.split(line)
                assert program == "hificl"
                with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as ended:
                    main(words)
                assert not ended.value.code, line
    return {**names, "folder": folder}


def test_each_is_shown_in_under_twenty_lines():
    assert {language for language, _ in BLOCKS} <= {"python", "bash"}
    assert all(len(block.splitlines()) < 20 for _, block in BLOCKS)


def test_a_lora_went_to_peft_and_came_back(page: dict[str, Any]):
    out: Path = page["folder"] / "out"
    assert (out / "lora/hificl.json").is_file() and not (out / "peft/hificl.json").exists()
    assert page["opened"].peft_config["default"].r == 4 and page["adapter"].options.rank == 4
