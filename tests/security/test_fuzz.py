"""Files that were damaged or forged at random: each is read, or refused in one line that names it; never a traceback.

`HIFICL_FUZZ=2000 pytest tests/security/test_fuzz.py` reads that many of each kind; the suite a small share.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import signal
import struct
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline import adapters
from pipeline.config.load import load
from pipeline.core import locks
from pipeline.core.errors import HificlError
from pipeline.core.locks import held
from pipeline.data.image_files import check_image, open_image
from pipeline.data.manifest import Manifest
from pipeline.evaluate.answerer import Answerer
from pipeline.plan.plan import make_plan
from pipeline.plan.space import Digests, cells
from pipeline.records import Record
from pipeline.records.evaluation import Evaluations
from pipeline.records.journal import Journal
from pipeline.records.store import TrialFolder
from pipeline.records.trial import Act, Attempts, Best, CheckpointState, EpochReport, EpochSoFar
from pipeline.sweep.recorded import read_recorded
from pipeline.tracking.provenance import data_digests
from pipeline.train import checkpoint
from pipeline.workspace.adapt import Budget, LaidOut
from tests.conftest import ROOT

NUMBER = int(os.environ.get("HIFICL_FUZZ", "12"))
SECONDS = 30  # that one file may take on a busy machine
GOLDEN = ROOT / "tests/golden/records"
KEY = "c850f8e56511b660"
ODD: list[Any] = [
    None, True, -1, 0, 2**70, 1.5, float("nan"), float("inf"), "", "x", "../x", "/etc/passwd", "\0", "\ud800", "é\n",
    [], {}, [None], [{}], {"a": 1}, "a" * 5000, "1" * 5000, [[[]]], "hificl", {"search": {"rank": []}}, [0, 1], 3,
    {"loguniform": [0, 0]}, {"uniform": ["a"]},
]  # fmt: skip


def places(value: Any, way: tuple = ()) -> Iterator[tuple]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*way, key)
        yield from places(value[key], (*way, key))


def forged(random: random.Random, value: Any) -> Any:
    """Return JSON of which some values, keys and places are others."""
    value = copy.deepcopy(value)
    for _ in range(random.randint(1, 3)):
        ways = list(places(value))
        if not ways:
            return random.choice(ODD)
        *way, last = random.choice(ways)
        node = value
        for key in way:
            node = node[key]
        match random.choice("rrrdpk"):
            case "r":
                node[last] = copy.deepcopy(random.choice(ODD))
            case "d":
                del node[last]
            case "p" if isinstance(node, list):
                node.append(copy.deepcopy(node[last]))
            case "k" if isinstance(node, dict):
                node[random.choice(["x", "<<", "é", "rank", "method", "schema", "check", "a.b", "0"])] = node.pop(last)
    return value


def damaged(random: random.Random, data: bytes) -> bytes:
    """Return bytes with bits flipped, parts cut, repeated or put in."""
    out = bytearray(data)
    for _ in range(random.randint(1, 6)):
        if not out:
            break
        at, other = random.randrange(len(out)), random.randrange(len(out))
        match random.choice("ffticzr"):
            case "f":
                out[at] ^= 1 << random.randrange(8)
            case "t":
                del out[at:]
            case "i":
                out[at:at] = random.randbytes(random.randint(1, 8))
            case "c":
                out[at : at + 8] = out[other : other + 8]
            case "z":
                out[at : at + 4] = random.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
            case "r":
                del out[at : at + random.randint(1, 20)]
    return bytes(out)


def changed(random: random.Random, text: str) -> bytes:
    """Return a JSON text, or one of JSON lines, changed as bytes or as values."""
    if random.random() < 0.5:
        return damaged(random, text.encode())
    try:
        return json.dumps(forged(random, json.loads(text))).encode()
    except json.JSONDecodeError:
        return "".join(json.dumps(forged(random, json.loads(line))) + "\n" for line in text.splitlines()).encode()


def survives(make: Callable[[random.Random], tuple[bytes, Path]], read: Callable[[], object], kind: str) -> None:
    """Write what `make` gives and read it, again and again."""

    def late(*_: object) -> None:
        raise TimeoutError(f"took longer than {SECONDS} s")

    before, failures = signal.signal(signal.SIGALRM, late), []
    try:
        for seed in range(NUMBER):
            data, path = make(random.Random(f"{kind} {seed}"))
            path.write_bytes(data)
            signal.alarm(SECONDS)
            try:
                read()
            except HificlError as error:
                line = " ".join(str(error).split())  # as the program prints it
                if len(line) > 4000 or not line.encode():
                    failures.append(f"{kind}, seed {seed}: no line: {line[:300]!r}")
            except Exception as error:
                at = traceback.extract_tb(error.__traceback__)[-1]
                said = f"{type(error).__name__} at {at.filename}:{at.lineno}: {error}"
                failures.append(f"{kind}, seed {seed}: {said[:300]}; {data[:300]!r}")
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not failures, f"{len(failures)} of {NUMBER}:\n" + "\n".join(failures[:20])


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.records.store.say", lambda _line: None)


RECORDS: dict[str, Callable[[Path], object]] = {
    f"runs/{KEY}/done.json": lambda root: TrialFolder(root / "runs" / KEY).end(),
    f"runs/{KEY}/config.json": lambda root: (
        TrialFolder(root / "runs" / KEY).config(), read_recorded(root / "runs" / KEY / "config.json"),
    ),
    f"runs/{KEY}/metrics.jsonl": lambda root: TrialFolder(root / "runs" / KEY).epochs(),
    f"runs/{KEY}/losses.jsonl": lambda root: TrialFolder(root / "runs" / KEY).losses(),
    "runs/journal.jsonl": lambda root: Journal(root / "runs", whole=True).news(),
    "evaluations/12eeadb14a0de6c0.json": lambda root: Evaluations(root / "evaluations").find("12eeadb14a0de6c0"),
    "evaluations/measures/0123456789abcdef.json": lambda root: (
        Evaluations(root / "evaluations").find_measurement("0123456789abcdef")
    ),
    "evaluations/studies/miniature-points.json": lambda root: (
        Evaluations(root / "evaluations").study("miniature-points")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_records(tmp_path, quiet, name):
    text = (GOLDEN / name).read_text(encoding="utf-8")
    (tmp_path / name).parent.mkdir(parents=True)
    survives(lambda random: (changed(random, text), tmp_path / name), lambda: RECORDS[name](tmp_path), name)


OTHERS: dict[str, Record] = {
    "adapt.json": LaidOut(asked={"data": "/x", "methods": ["lora"], "minutes": 1.5}, budget=Budget(1, 2, 3, 4, 5)),
    "runs/acts.jsonl": Act(time=1.5, act="clone", trial=KEY, parent="0" * 16, changes={"rank": 3}),
    f"runs/.leases/{KEY}.tried": Attempts(attempts=2, at="epoch-0001", error="a worker died"),
    "so-far-rank0000.json": EpochSoFar(
        steps=2, sums={"train_loss": 0.5}, losses=(0.5, 0.25), gradient_norm=1.0, learning_rate_scale=0.5, seconds=3.0
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_records(tmp_path, name):
    example, path = OTHERS[name], tmp_path / "file"
    assert type(example).parse(example.text(), name, "") == example
    survives(lambda random: (changed(random, example.text()), path), lambda: type(example).read(path, "x"), name)


def test_dvcs_lock(tmp_path):
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text())
    assert "checkpoints/mini-idefics2" in data_digests(ROOT).outs

    def make(random):
        text = yaml.safe_dump(forged(random, lock)).encode("utf-8", "surrogatepass")
        return damaged(random, text) if random.random() < 0.5 else text, tmp_path / "dvc.lock"

    survives(make, lambda: data_digests(tmp_path), "dvc.lock")


def test_a_checkpoints_state(tmp_path):
    state = CheckpointState(epoch=1, rows=(EpochReport(epoch=1, objective=0.5),), best=Best(epoch=1, objective=0.5))

    def make(random):
        checkpoint.save(tmp_path, state, lambda folder: (folder / "engine.safetensors").write_bytes(b"x" * 100))
        path = tmp_path / "epoch-0001/state.json"
        return changed(random, path.read_text()), path

    survives(make, lambda: checkpoint.newest(tmp_path), "state.json")


def test_a_locks_note(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_WATCHED", 0.01)  # seconds for a holder on another host to give a sign of life
    monkeypatch.setattr(locks, "_POLL_SECONDS", 0.005)

    def read():
        with held(tmp_path / ".lock", "x"):
            pass

    note = '{"what": "a sweep", "pid": 1, "host": "", "boot": "b", "started": "1", "since": "now"}'
    note = note.replace('"host": ""', f'"host": "{os.uname().nodename}"')
    survives(lambda random: (changed(random, note), tmp_path / ".lock"), read, "lock")


@pytest.mark.parametrize("part", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter(tiny, tmp_path, part):
    model, folder = tiny("idefics2-8b-base").model, tmp_path / "a"
    made = {}
    for name, options in (("hificl", {"rank": 2}), ("mimic", {}), ("live", {}), ("lora", {"rank": 2})):
        extra = {"backbone": "idefics2-8b-base", "task": "vqav2", "trial": "t"}
        adapters.create(name, model, **options).save_pretrained(tmp_path / name, extra=extra)
        made[name] = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
    folder.mkdir()

    def make(random):
        files = random.choice(list(made.values()))
        for name, data in files.items():
            (folder / name).write_bytes(data)
        if part.endswith(".json"):
            return changed(random, files[part].decode()), folder / part
        data = files[part]
        if random.random() < 0.5:
            return damaged(random, data), folder / part
        size = struct.unpack("<Q", data[:8])[0]
        head = json.dumps(forged(random, json.loads(data[8 : 8 + size]))).encode()
        return struct.pack("<Q", len(head)) + head + data[8 + size :], folder / part

    def read():
        Answerer(folder)
        adapters.load(folder, model)

    survives(make, read, part)


def test_a_manifest(small_world, tmp_path):
    whole = (small_world / "mini-vqa/manifest.json").read_bytes()
    path = tmp_path / "manifest.json"

    def make(random):
        if random.random() < 0.5:
            return damaged(random, whole), path
        try:
            return json.dumps(forged(random, json.loads(whole))).encode(), path
        except json.JSONDecodeError:
            lines = whole.decode().splitlines()
            at = random.randrange(len(lines))
            lines[at] = damaged(random, lines[at].encode()).decode(errors="replace")
            return "\n".join(lines).encode(), path

    survives(make, lambda: Manifest.load(path), "manifest")


def test_a_picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    seeds = []
    for form in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"):
        for mode in ("RGB", "L"):
            buffer = io.BytesIO()
            Image.fromarray(pixels).convert(mode).save(buffer, form)
            seeds.append(buffer.getvalue())
    path = tmp_path / "x"

    def read():
        check_image(path)
        open_image(path)

    survives(lambda random: (damaged(random, random.choice(seeds)), path), read, "picture")


def test_params(tmp_path):
    whole = yaml.safe_load((ROOT / "params.yaml").read_text())
    for kind in ("profiles", "studies"):
        (tmp_path / kind).symlink_to(ROOT / kind)
    profile = yaml.safe_load((ROOT / "profiles/mini.yaml").read_text())
    path = tmp_path / "params.yaml"

    def make(random):
        if random.random() < 0.3:
            return damaged(random, (ROOT / "params.yaml").read_bytes()), path
        given = {**whole, "profiles": {"own": profile}, "profile": "own"} if random.random() < 0.5 else whole
        text = yaml.safe_dump(forged(random, given), sort_keys=False, allow_unicode=random.random() < 0.5)
        return text.encode("utf-8", "surrogatepass"), path

    def read():
        params = load(path)
        known = Digests(
            backbones=dict.fromkeys(params.run.backbones, "d" * 64),
            manifests=dict.fromkeys(params.run.tasks, "m" * 64),
            train_sizes=dict.fromkeys(params.run.tasks, 1000),
        )  # fmt: skip
        every = [cell for study in params.run.studies[:2] for cell in cells(params, study, known)]
        make_plan(params, every, SimpleNamespace(runs=tmp_path, manifest=lambda _task: tmp_path, cache=None))

    survives(make, read, "params.yaml")


VALUES = [
    "1", "-1", "nan", "[", "{a: 1}", "null", "'", "x" * 3000, "1e999", "!!binary a", "&a [*a]", "true", "[1,2]", "0x10",
    "2026-01-01", ".inf", "\u2028", "a: b: c", "\0",
]  # fmt: skip


def test_values_of_the_command_line(tmp_path):
    whole = yaml.safe_load((ROOT / "params.yaml").read_text())

    def make(random):
        way = random.choice(list(places(whole)))
        item = f"{'.'.join(map(str, way))}={random.choice(VALUES)}"
        return item.encode(), tmp_path / "item"

    def read():
        load(ROOT / "params.yaml", overrides=[(tmp_path / "item").read_bytes().decode()])

    survives(make, read, "--set")
