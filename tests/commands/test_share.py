"""`hificl export` and `hificl push`: opened by PEFT, and by who takes it from a folder in the hub's place."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel

from pipeline import adapters, backbones
from pipeline.adapters.base import Score
from pipeline.cli import main
from pipeline.records.evaluation import CellResult, Evaluations, StudyFile
from pipeline.records.store import TrialFolder, TrialStore
from pipeline.records.trial import Provenance, TrialEnd
from tests.conftest import ROOT

BACKBONE = "mini-llava"


@pytest.fixture(scope="module")
def model() -> Any:
    return backbones.load(BACKBONE).model


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    adapter = adapters.create("hificl", model, num_virtual_tokens=4, rank=2, heads="kv")
    torch.nn.init.normal_(adapter.v_b, std=0.5, generator=torch.Generator().manual_seed(0))
    adapter.save_pretrained(tmp_path / "adapter", {"backbone": BACKBONE, "task": "mini-vqa", "trial": "abc123"})
    return tmp_path / "adapter"


def hificl(capfd: Any, *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


def test_export_writes_what_peft_opens(folder: Path, model: Any, tmp_path: Path, capfd: Any) -> None:
    words = ["export", "--adapter", folder, "--to", "peft", "--out", tmp_path / "out"]
    status, out, _ = hificl(capfd, *words)
    assert status == 0
    assert json.loads(out) == {
        "folder": str(tmp_path / "out"), "kind": "CARTRIDGE", "method": "hificl", "backbone": BACKBONE,
        "files": ["adapter_config.json", "adapter_model.safetensors"], "exact_up_to": None,
    }  # fmt: skip
    ids = torch.arange(10, 22)[None]
    with torch.no_grad(), adapters.attach(model, adapters.load(folder, model)):
        ours = model(input_ids=ids).logits
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(model, tmp_path / "out").eval()(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert hificl(capfd, *words)[2].strip() == f"error: {tmp_path}/out: is not empty. Give a folder that is made"


def test_export_says_what_is_missing_or_cannot_be(model: Any, tmp_path: Path, capfd: Any) -> None:
    adapters.create("hificl", model).save_pretrained(tmp_path / "adapter")
    words = ["export", "--adapter", tmp_path / "adapter", "--to", "peft", "--out", tmp_path / "out"]
    status, _, line = hificl(capfd, *words)
    assert status == 2 and "the adapter does not name its backbone. Give --backbone" in line
    status, _, line = hificl(capfd, *words, "--backbone", BACKBONE)
    assert status == 2 and "Train it with heads: kv. Or export it with --to module" in line
    assert not (tmp_path / "out").exists()


def test_another_backbone_than_the_folder_names_is_refused_by_every_verb(
    folder: Path, tmp_path: Path, capfd: Any
) -> None:
    for verb, *more in (
        ("predict", "--question", "Which colour?"),
        ("export", "--to", "peft", "--out", tmp_path / "out"),
        ("push", "--to", "lab/colours", "--hub", tmp_path / "hub"),
    ):
        status, _, line = hificl(capfd, verb, "--adapter", folder, "--backbone", "mini-idefics2", *more)
        problem = f"the adapter in {folder} was trained on {BACKBONE}. Leave --backbone out"
        assert status == 2 and line.strip() == f"error: --backbone mini-idefics2: {problem}", verb
    assert not (tmp_path / "out").exists() and not (tmp_path / "hub").exists()


def test_an_adapter_that_is_not_the_one_of_its_training_is_refused_by_every_verb(
    folder: Path, tmp_path: Path, capfd: Any
) -> None:
    TrialFolder(tmp_path).finish(TrialEnd(status="finished"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "extra": {**config["extra"], "trial": "other"}}))
    for verb, *more in (
        ("predict", "--question", "Which colour?"),
        ("export", "--to", "peft", "--out", tmp_path / "out"),
        ("push", "--to", "lab/colours", "--hub", tmp_path / "hub"),
    ):
        status, _, line = hificl(capfd, verb, "--adapter", folder, *more)
        assert status == 2 and f"{folder}: not the adapter that the training ended with" in line, verb
    assert not (tmp_path / "out").exists() and not (tmp_path / "hub").exists()


def test_push_writes_a_card_beside_the_adapter(folder: Path, model: Any, tmp_path: Path, capfd: Any) -> None:
    words = ["push", "--adapter", folder, "--to", "lab/colours", "--hub", tmp_path / "hub"]
    status, out, _ = hificl(capfd, *words)
    place = tmp_path / "hub/lab/colours"
    assert status == 0 and json.loads(out) == {"place": str(place), "repository": "lab/colours", "scores": 0}
    _, head, text = (place / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": BACKBONE, "library_name": "transformers", "tags": ["hificl-lab", "hificl"]
    }  # fmt: skip
    for said in (
        "out = alpha SA(q) + beta V_learn",
        "| rank | 2 |",
        "- task: mini-vqa",
        "- trial: abc123",
        "Not scored",
    ):
        assert said in text
    assert text.count("```") == 6
    assert adapters.load(place, model).options == adapters.load(folder, model).options
    assert hificl(capfd, *words)[0] == 2
    assert "names no repository" in hificl(capfd, *words[:3], "--to", "../x/y", "--hub", tmp_path)[2]


def test_the_card_of_a_trial_says_what_it_was_made_from_and_what_its_settings_scored(
    trial: Any, folder: Path, tmp_path: Path, capfd: Any
) -> None:
    for name in ("params.yaml", "profiles", "studies"):
        (tmp_path / name).symlink_to(ROOT / name)
    config = trial("hificl", tmp_path).config
    origin = Provenance(commit="c0ffee", versions={"torch": "2.13.0"})
    place = TrialStore(tmp_path / "runs").open(config, origin) / "adapter"
    adapters.load(folder, backbones.load(BACKBONE).model).save_pretrained(
        place, {"backbone": BACKBONE, "task": "mini-vqa", "trial": config.key}
    )
    row = {"row": "hificl", "label": "HiFICL", "method": "hificl", "backbone": BACKBONE, "paper_backbone": BACKBONE,
           "task": "mini-vqa", "paper_task": "vqav2", "metric": "accuracy", "unit": "percent"}  # fmt: skip
    seeds = [(71.0, config.key), (73.0, "another"), (72.0, "third")]
    cells = tuple(CellResult(**row, seed=i, value=value, trial=key) for i, (value, key) in enumerate(seeds))
    other = CellResult(**{**row, "row": "mimic"}, value=12.0, trial="mimics")
    Evaluations(tmp_path / "evaluations").write_study(StudyFile(study="small", title="", cells=(*cells, other)))
    words = ["push", "--adapter", place, "--to", "lab/colours", "--hub", tmp_path / "hub"]
    status, out, _ = hificl(capfd, *words)
    assert status == 0 and json.loads(out)["scores"] == 1
    text = (tmp_path / "hub/lab/colours/README.md").read_text()
    for said in (
        f"- manifest_digest: {config.manifest_digest}", f"- backbone_digest: {config.backbone_digest}",
        f"- learning_rate: {config.learning_rate}", f"- seed: {config.seed}", "- code: c0ffee", "- torch: 2.13.0",
        "- revision: not pinned", "| mini-vqa | accuracy (percent) | 72 ± 1 | 3 |",
    ):  # fmt: skip
        assert said in text


def test_scores_are_shown_with_their_spread() -> None:
    assert Score("vqav2", "accuracy", "%", (71.0, 73.0, 72.0)).line() == "| vqav2 | accuracy (%) | 72 ± 1 | 3 |"
    assert Score("vqav2", "accuracy", "%", (71.5,)).line() == "| vqav2 | accuracy (%) | 71.5 | 1 |"


def test_the_hubs_own_client_uploads_the_folder(model: Any, monkeypatch: Any) -> None:
    """The client is the real one; what listens keeps what the hub would keep."""
    kept: dict[str, bytes] = {}

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            host = f"http://127.0.0.1:{self.server.server_address[1]}"
            if self.path.endswith("/repos/create"):
                kept["create"] = body
                answer: Any = {"url": f"{host}/lab/colours"}
            elif self.path.endswith("/validate-yaml"):
                answer = {"errors": [], "warnings": []}
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            else:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        kept[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                answer = {"commitUrl": f"{host}/lab/colours/commit/1", "commitOid": "1" * 40, "success": True}
            self.reply(answer)

        def do_GET(self) -> None:
            self.reply({"id": "lab/colours", "sha": "0" * 40, "siblings": []})

        def reply(self, answer: Any) -> None:
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    adapter = adapters.create("lora", model, rank=1)
    place = adapter.push_to_hub("lab/colours", "org/base", revision="main")
    server.shutdown()
    assert "lab/colours" in place and json.loads(kept["create"])["visibility"] == "private"
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "hificl.json"} <= kept.keys()
    assert b'library_name: "peft"' in kept["README.md"]
    assert b'PeftModel.from_pretrained(model, "lab/colours")' in kept["README.md"]
