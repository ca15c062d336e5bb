"""Files that somebody may hand over: each is refused in one line that names it, nothing of it is run, memory stays."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from pipeline import adapters
from pipeline.config.load import load
from pipeline.core.errors import InputError
from pipeline.data import MAX_PIXELS
from pipeline.data.image_files import check_image, open_image
from pipeline.data.manifest import Manifest, Source
from pipeline.data.sample import ImageRef, Sample
from tests.conftest import ROOT


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Bomb:
    """What unpickling would do: leave a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


# -- an adapter's folder ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("idefics2-8b-base").model


@pytest.fixture
def folder(model, tmp_path) -> Path:
    adapters.create("hificl", model, rank=2).save_pretrained(tmp_path / "adapter")
    assert adapters.load(tmp_path / "adapter", model).num_trainable() > 0
    return tmp_path / "adapter"


def change(folder: Path, edit) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def test_a_pickle_in_the_place_of_weights_is_not_opened(folder, model, tmp_path):
    for content in (pickle.dumps(Bomb(tmp_path / "trace")), b"", b"\xff" * 64, struct.pack("<Q", 1 << 60) + b"{}"):
        (folder / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=r"adapter_model\.safetensors: not readable"):
            adapters.load(folder, model)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        adapters.load(folder, model)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_link_out_of_the_folder_is_not_followed(folder, model, tmp_path, name):
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(InputError, match="leads out of the folder"):
        adapters.load(folder, model)


@pytest.mark.parametrize(
    "options",
    [{"rank": 10**6}, {"rank": 10**12}, {"num_virtual_tokens": 10**9}, {"rank": 10**18, "num_virtual_tokens": 10**18}],
)
def test_absurd_shapes_are_refused_before_memory_is_taken(folder, model, options):
    change(folder, lambda config: config["options"].update(options))
    before, start = peak_mib(), time.monotonic()
    with pytest.raises(InputError):
        adapters.load(folder, model)
    assert peak_mib() - before < 50 and time.monotonic() - start < 5


def test_a_configuration_that_is_none(folder, model):
    for text in ("[" * 200_000, "{" * 100, '{"method": "hificl"}', "null", " " * (1 << 21)):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(InputError, match=r"adapter_config\.json"):
            adapters.load(folder, model)


@pytest.mark.parametrize("part", [{"extra": ["x"]}, {"options": 3}, {"backbone": {}}])
def test_a_configuration_with_a_part_of_another_kind(folder, model, part):
    change(folder, lambda config: config.update(part))
    with pytest.raises(InputError, match="not an adapter's configuration"):
        adapters.load(folder, model)


@pytest.mark.parametrize("method", ["../../etc/passwd", "os", "pipeline.cli", "hificl; rm -rf /"])
def test_a_method_is_a_registered_name(folder, model, method):
    change(folder, lambda config: config.update(method=method))
    with pytest.raises(InputError, match="unknown method"):
        adapters.load(folder, model)


@pytest.mark.parametrize("extra", [{"backbone": "../../../tmp", "task": "vqav2"}, {"backbone": "x", "task": "../x"}])
def test_predict_takes_no_path_from_an_adapter(folder, pictures, extra):
    """The backbone and the task that a folder names are looked up among the registered ones; a path is no name."""
    from pipeline.commands.predict import ask

    change(folder, lambda config: config.update(extra=extra))
    with pytest.raises(InputError, match=r"unknown (backbone|task) '\.\./"):
        ask(folder, pictures / "0.png", question="What?")


# -- a manifest ------------------------------------------------------------------------------------------------------


def manifest(image: str, source: str = "annotations.json") -> Manifest:
    sample = Sample(task="vqav2", sample_id=1, images=(ImageRef(image),), question="q", target="a", references=("a",))
    return Manifest(
        task="vqav2", seed=0, sources=(Source(source, "0" * 64, 1),), image_root=Path("/"),
        splits={"train": (sample,), "selection": (), "evaluation": ()},
    )  # fmt: skip


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "images/../../../x.jpg", "..\\x.jpg", "x\0.jpg"])
def test_a_manifest_that_leads_out_of_the_data_root_is_refused(tmp_path, path):
    for bad in (manifest(path), manifest("images/1.jpg", path)):
        bad.save(tmp_path / "manifest.json")  # sealed by its own digest, as a forger would
        with pytest.raises(InputError, match="leads out of the data root"):
            Manifest.load(tmp_path / "manifest.json")


def test_a_manifest_nested_without_end_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(InputError, match=r"manifest\.json"):
        Manifest.load(tmp_path / "manifest.json")


# -- an image --------------------------------------------------------------------------------------------------------


def png(width: int, height: int, *chunks: tuple[bytes, bytes], depth: int = 8, colour: int = 2) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in ((b"IHDR", head), *chunks, (b"IEND", b"")))


def test_decompression_bombs_are_refused_before_they_unfold(tmp_path):
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    text = b"Comment\0\0" + zlib.compress(bytes(1 << 26))
    bombs = {
        "wide.png": png(60_000, 60_000, (b"IDAT", rows)),
        "text.png": png(8, 8, (b"zTXt", text), (b"IDAT", zlib.compress(bytes(200)))),
        "huge.gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\0;",
    }
    before = peak_mib()
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
        assert check_image(tmp_path / name).problem
        with pytest.raises(InputError, match=name):
            open_image(tmp_path / name)
    assert peak_mib() - before < 200


@pytest.mark.parametrize(("depth", "colour", "pixel"), [(16, 0, 2), (8, 2, 3)], ids=["16-bit grey", "RGB"])
def test_a_picture_just_within_the_limit_takes_a_gibibyte_at_most(tmp_path, depth, colour, pixel):
    """In a process of its own: a file of some 300 kB."""
    side = int(MAX_PIXELS**0.5)
    packer, row = zlib.compressobj(9), bytes(1 + side * pixel)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    (tmp_path / "large.png").write_bytes(png(side, side, (b"IDAT", rows), depth=depth, colour=colour))
    code = (
        "import resource, sys; from pipeline.data.image_files import open_image;"
        "before = resource.getrusage(0).ru_maxrss;"
        "size = open_image(sys.argv[1]).size; print(*size, (resource.getrusage(0).ru_maxrss - before) / 2**20)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "large.png")], capture_output=True, text=True, check=True, cwd=ROOT
    )
    width, height, gib = map(float, done.stdout.split())
    assert (width, height) == (side, side) and gib < 1.0


def test_a_picture_that_is_a_program_is_not_run(tmp_path):
    """Pillow would hand PostScript to Ghostscript."""
    picture = Image.new("RGB", (8, 8))
    content = io.BytesIO()
    picture.save(content, "EPS")
    (tmp_path / "x.jpg").write_bytes(content.getvalue())
    with pytest.raises(InputError, match="no image of a known format"):
        open_image(tmp_path / "x.jpg")
    for kind in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"):
        picture.save(tmp_path / "good", kind)
        assert open_image(tmp_path / "good").size == (8, 8)


# -- params ----------------------------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x: !!python/object/apply:os.system ['touch pwned']", "could not determine a constructor"),
        ("x: !!python/name:os.system", "could not determine a constructor"),
        (LAUGHS, "once its aliases are written out"),
        (MERGES, "once its aliases are written out"),
        ("a: &a [*a]", "stands for itself"),
        ("a: &a {b: *a}", "stands for itself"),
        ("[" * 50_000, "nested too deep"),
        ("x: 2026-13-45", r"takes '2026-13-45' \(line 1\) for a date. Put it in quotes"),
        ("x: " + "y" * 5_000_000, "characters"),
    ],
    ids=["object", "name", "laughs", "merges", "list of itself", "map of itself", "deep", "date", "long"],
)
def test_a_params_file_that_is_more_than_values_is_refused(tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(text)
    before, start = peak_mib(), time.monotonic()
    with pytest.raises(InputError, match=says) as caught:
        load(tmp_path / "params.yaml")
    assert "params.yaml" in str(caught.value)
    assert peak_mib() - before < 200 and time.monotonic() - start < 20
    assert not (tmp_path / "pwned").exists()


def test_the_same_holds_for_values_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for value in ("!!python/object/apply:os.system [touch pwned]", "&a [*a]", "[" * 5_000, "{"):
        with pytest.raises(InputError, match="--set"):
            load(overrides=[f"sweep.address={value}"])


SHELL = ["$(touch pwned)", "`touch pwned`", "; touch pwned", "| touch pwned", "&& touch pwned", "x' ; touch pwned ; '"]


@pytest.mark.parametrize("value", SHELL)
def test_metacharacters_stay_characters_in_a_jobs_command(tmp_path, value):
    """Ray runs a job's command in a shell; what a user writes must reach the sweep as it was written."""
    from pipeline.pool.cluster import entrypoint

    (tmp_path / "pipeline.py").write_text("import sys, json; print(json.dumps(sys.argv[1:]))")
    home = tmp_path / f"home {value.replace('/', '')}"
    home.mkdir()
    (tmp_path / "pipeline.py").rename(home / "pipeline.py")
    arguments = ["--study", value, "--set", f"studies.x.title={value}"]
    line = entrypoint(str(home), arguments, "http://127.0.0.1:5000")
    done = subprocess.run(["/bin/sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["sweep", "--set", "sweep.address=auto", *arguments]
    assert not list(tmp_path.rglob("pwned"))


def test_a_study_named_like_a_path_is_unknown(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("../../etc", "x;touch pwned"):
        with pytest.raises(InputError, match="unknown study"):
            load(overrides=["run.studies=[hificl-table1]", f'run.study_changes={{"{name}": {{}}}}'])


def test_no_module_opens_pickles():
    """Neither the library nor its benchmarks call what runs code out of a file."""
    opens = {"pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "joblib.load", "dill.load", "dill.loads",
             "cloudpickle.load", "cloudpickle.loads", "shelve.open", "marshal.loads"}  # fmt: skip
    calls = {}
    for file in [
        *(ROOT / "pipeline").rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
        *(ROOT / "stages").rglob("*.py"),
    ]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                name = f"{node.value.id}.{node.attr}" if isinstance(node.value, ast.Name) else f".{node.attr}"
                if name in opens or node.attr in ("load_checkpoint", "load_universal_checkpoint"):
                    calls[f"{file.relative_to(ROOT)}:{node.lineno}"] = name
            elif isinstance(node, ast.ImportFrom) and node.module in (
                "pickle",
                "dill",
                "cloudpickle",
                "joblib",
                "shelve",
            ):
                calls[f"{file.relative_to(ROOT)}:{node.lineno}"] = node.module
    assert calls == {}
