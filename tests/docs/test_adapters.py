"""Every line of docs/adapters.md, run in its order beside the miniature's checkpoints."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline import adapters
from pipeline.cli import main
from pipeline.core.errors import InputError
from pipeline.evaluate.answerer import Answerer
from tests.conftest import ROOT
from tests.support.serving import BACKBONE, Server

PAGE = (ROOT / "docs/adapters.md").read_text(encoding="utf-8")
# run by test_harness.py, test_packaging.py, test_models.py and test_image.py
ELSEWHERE = ("python -m lmms_eval ", "python -m pipeline.evaluate.harness ", "pip ", "mlflow ", "docker ")
BLOCK = r"^```(\w*)\n(.*?)^```"
BLOCKS = re.findall(BLOCK, PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def page(tmp_path_factory: Any) -> dict[str, Any]:
    """Run the page in a folder of its own; return what its lines have made."""
    folder, names = tmp_path_factory.mktemp("page"), dict[str, Any](__name__="page")
    (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    Image.new("RGB", (32, 32), "red").save(folder / "photo.png")
    torch.set_num_threads(1)
    server: Server | None = None
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setenv("HOME", str(folder))
        for language, block in BLOCKS:
            if language == "python":
                code = block.replace("http://127.0.0.1:8000", server.url) if server else block
                exec(compile(code, "docs/adapters.md", "exec"), names)
                continue
            for line in block.replace("\\\n", " ").splitlines():
                program, *words = shlex.split(line)
                if line.startswith(ELSEWHERE):
                    continue
                assert program == "hificl"
                if words[:3] == ["serve", "--backbone", BACKBONE]:
                    server = Server(words[3:], folder, cwd=folder)
                    continue
                with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as ended:
                    main(words)
                assert not ended.value.code, line
    assert server and server.end() == 0
    names["plain"].unwrap()
    return {**names, "folder": folder}


def test_each_is_shown_in_under_twenty_lines():
    assert {language for language, _ in BLOCKS} <= {"python", "bash"}
    parts = [re.findall(BLOCK, part, re.DOTALL | re.MULTILINE) for part in PAGE.split("\n## ")[1:]]
    assert sum(map(len, parts)) == len(BLOCKS) - 1  # what all of them begin with
    lines = [[line for _, block in part for line in block.splitlines() if line] for part in parts]
    assert all(len(of_part) < 20 for of_part in lines)


def test_a_lora_went_to_peft_and_came_back(page: dict[str, Any]):
    out: Path = page["folder"] / "out"
    assert (out / "lora/hificl.json").is_file() and not (out / "peft/hificl.json").exists()
    assert page["opened"].peft_config["default"].r == 4 and page["adapter"].options.rank == 4


def test_virtual_tokens_went_to_peft_and_to_a_module(page: dict[str, Any]):
    assert page["prefixed"].peft_config["default"].peft_type == "CARTRIDGE"
    batch = page["question"]
    with adapters.attach(page["plain"], adapters.load(page["folder"] / "out/hificl", page["plain"])), torch.no_grad():
        ours = page["plain"](**batch).logits
    with torch.no_grad():
        torch.testing.assert_close(page["prefixed"].eval()(**batch).logits, ours, rtol=0, atol=1e-4)
    assert page["Adapter"].__module__ == "hificl_adapter"


def test_a_trainer_taught_it_a_server_said_it_and_the_hub_has_it(page: dict[str, Any]):
    assert page["answer"] == page["again"] == page["served"] == "redun"
    assert (page["folder"] / "out/trainer/checkpoint-20/adapter_model.safetensors").is_file()
    assert {path.name for path in (page["folder"] / "out/hub/lab").iterdir()} == {"colours", "lora"}
    assert page["taken"].extra["template"]["text"].startswith("Image: <image>")


def test_a_wrapped_models_adapter_asks_by_its_own_prompt(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(page["folder"])
    trained, photo = Path("out/trained"), Path("photo.png")
    with pytest.raises(InputError, match="does not name its backbone. Give --backbone"):
        Answerer(trained)
    with pytest.raises(InputError, match="names neither its task nor a prompt. Give --task"):
        Answerer(Path("out/mimic"), backbone=BACKBONE)
    own = Answerer(trained, backbone=BACKBONE)
    said = own.answer(photo, "Which colour?")
    assert said["answer"] == "redun" and said["task"] is None
    for image, question, problem in ((photo, None, "needs a question"), (None, "Which colour?", "needs an image")):
        with pytest.raises(InputError, match=f"the adapter's own prompt {problem}"):
            own.answer(image, question)


def test_mlflows_line_is_the_one_that_test_models_runs():
    (line,) = re.findall("^mlflow .*$", PAGE, re.MULTILINE)
    assert line in (ROOT / "docs/lineage.md").read_text(encoding="utf-8").splitlines()
