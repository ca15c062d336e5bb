"""Where weights are, whether they are what they should be, and the digest that names them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from pipeline.backbones.base import IMAGE_BACKEND, Backbone
from pipeline.core.errors import InputError, WorkError
from pipeline.core.files import stamp, write_atomic
from pipeline.core.locks import held
from pipeline.core.plain_yaml import Json

CHECKPOINTS = "checkpoints"  # the miniatures' folder, beside params.yaml
INDEX = "model.safetensors.index.json"
# Everything that decides what a model computes. Not the README, a training record, or the generation settings, which
# are replaced by ours.
_DECIDING = (
    "config.json", "preprocessor_config.json", "processor_config.json", "chat_template.*", "tokenizer.*",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "*.safetensors", INDEX,
)  # fmt: skip
_BIG = 64 << 20  # bytes; below, hashing again is quicker than remembering


def find_folder(
    backbone: Backbone, weights: Path | str | None, revision: str | None, *, allow_download: bool = False
) -> Path:
    """Return the folder with a backbone's published layout.

    Raises:
        InputError: it is not there; the message says what to download and where to put it.
    """
    weights, revision = weights or backbone.family.folder, revision or backbone.family.revision
    if weights is not None:
        folder = Path(weights).expanduser()
        if not folder.is_dir():
            raise InputError("this folder with weights does not exist", where=str(folder), way_out=_way_out(backbone))
        return folder
    if backbone.hub_id is None:
        project = Path(__file__).resolve().parents[2]
        for root in (Path.cwd(), project):
            if (root / CHECKPOINTS / backbone.name).is_dir():
                return root / CHECKPOINTS / backbone.name
        raise InputError(
            f"the miniature {backbone.name} is not made yet",
            where=f"{CHECKPOINTS}/{backbone.name}",
            way_out=_way_out(backbone),
        )
    from huggingface_hub import snapshot_download

    gguf = backbone.family.gguf
    try:
        snapshot = snapshot_download(
            backbone.hub_id, revision=revision, local_files_only=not allow_download,
            allow_patterns=[*_DECIDING, *([gguf] if gguf else [])],
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - the hub's client raises its own, its transport's and OS errors
        raise InputError(
            f"the weights of {backbone.name} are not on this machine",
            where=f"backbones.{backbone.name}.weights",
            way_out=_way_out(backbone),
        ) from error
    return Path(snapshot)


def _way_out(backbone: Backbone) -> str:
    if backbone.family.by_name and backbone.hub_id is None:
        return "Give a folder in the hub's layout"
    if backbone.hub_id is None:
        return "Make it with: dvc repro backbone"
    return (
        f"Download {backbone.hub_id}, for instance `hf download {backbone.hub_id} --local-dir weights/{backbone.name}`"
        f", and set backbones.{backbone.name}.weights to that folder in params.yaml; "
        "or set its variant to tiny for random weights"
    )


def check_folder(backbone: Backbone, folder: Path) -> None:
    """Check that `folder` holds the safetensors of this architecture, every shard of them.

    Raises:
        InputError: something is missing, pickled, or another model's.
    """
    backbone.family.config_in(folder)
    if backbone.family.gguf is not None:
        return
    config = _read_json(folder / "config.json", backbone)
    model_type = config.get("model_type")
    if model_type != backbone.family.model_type:
        raise InputError(
            f"model_type is {model_type!r}, but {backbone.name} is a '{backbone.family.model_type}'",
            where=str(folder / "config.json"),
            way_out=_way_out(backbone),
        )
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX, backbone).get("weight_map")
        shards = sorted({str(shard) for shard in weight_map.values()}) if isinstance(weight_map, dict) else []
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing or not shards:
            problem = f"{len(missing)} of {len(shards)} weight files are missing: {', '.join(missing[:3])}"
            raise InputError(problem, where=str(folder), way_out=_way_out(backbone))
        return
    if not (folder / "model.safetensors").is_file():
        pickled = any(folder.glob("pytorch_model*.bin"))
        problem = "only pickled weights (.bin), which are not opened" if pickled else "model.safetensors is missing"
        raise InputError(problem, where=str(folder), way_out=_way_out(backbone))


def _read_json(path: Path, backbone: Backbone) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path.name} is missing", where=str(path.parent), way_out=_way_out(backbone)) from error
    except ValueError as error:
        raise InputError(f"no valid JSON ({error})", where=str(path), way_out=_way_out(backbone)) from error
    if not isinstance(value, dict):
        raise InputError("not a JSON object", where=str(path), way_out=_way_out(backbone))
    return value


def digest_of_settings(settings: Mapping[str, Any]) -> str:
    """Return the sha256 of settings; it names weights that are made from a seed."""
    text = json.dumps({**settings, "image_backend": IMAGE_BACKEND}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_folder(folder: Path, backbone: Backbone) -> str:
    """Return the sha256 over name and sha256 of every deciding file of a published layout.

    Of a backbone by name, how it is prompted decides too.

    A big file's sha256 is taken from the hub cache's own file name where the folder is one, else remembered in the
    user's cache folder by path and `digests.stamp`, so that 16 GB are read once a node, whatever starts there.
    """
    family = backbone.family
    files = sorted({path for pattern in _DECIDING for path in folder.glob(pattern)})
    if family.gguf is not None:
        files = [folder / family.gguf]
    total = hashlib.sha256(f"image_backend={IMAGE_BACKEND}\n{family.prompting}".encode())
    for path in files:
        total.update(f"{path.name} {digest_of_file(path)}\n".encode())
    return total.hexdigest()


def digest_of_file(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes."""
    real = path.resolve()
    if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name  # the hub's cache files big blobs under their sha256
    if real.stat().st_size < _BIG:
        return hashlib.sha256(real.read_bytes()).hexdigest()
    identity = json.dumps([str(real), *stamp(real)])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hificl-lab" / "sha256"
    note = cache / hashlib.sha256(identity.encode()).hexdigest()
    if known := _noted(note):
        return known
    with ExitStack() as turn:
        with suppress(WorkError):  # a home that cannot be written costs time only
            turn.enter_context(held(note.with_suffix(".lock"), "hashing", wait=None))  # a node's slots start together
        if known := _noted(note):  # by who had the turn before
            return known
        with real.open("rb") as file:
            known = hashlib.file_digest(file, "sha256").hexdigest()
        with suppress(WorkError):
            write_atomic(note, known)
    return known


def _noted(note: Path) -> str | None:
    try:
        known = note.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return known if re.fullmatch(r"[0-9a-f]{64}", known) else None
