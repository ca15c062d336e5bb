"""The manifest: which samples of which files a study uses, with one digest over all of it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.config.trial import TrialConfig
from pipeline.core.errors import InputError
from pipeline.core.files import read_error, write_atomic
from pipeline.core.plain_yaml import Json
from pipeline.data.image_files import changed, check_images, problems_error
from pipeline.data.sample import PromptStyle, Sample

SPLITS = ("train", "selection", "evaluation")
FORMAT = 1


@dataclass(frozen=True)
class Source:
    """One official file that was read: path relative to the data root, SHA-256, size in bytes."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The samples of the three splits, and everything they were made from.

    Attributes:
        task: name of the task.
        seed: of the draw.
        sizes: number of samples by split name.
        sources: the official files read.
        splits: samples by split name: `train`, `selection`, `evaluation`.
        image_root: the data root that `ImageRef.path` is relative to; the only field outside the digest,
            so that the same data in another folder is the same manifest.
        replaced: samples passed over because their image's bytes are also in another split.
        prompt: whose wording the prompts of these samples have.
        definition: what the task is, where it is one over a file of the user's own (`config.schema.TaskFile`).
        notes: what was guessed of that file, and which rows were left out; outside the digest.
    """

    task: str
    seed: int
    sources: tuple[Source, ...]
    splits: Mapping[str, tuple[Sample, ...]]
    image_root: Path
    replaced: tuple[Mapping[str, Any], ...] = field(default=())
    prompt: PromptStyle = "papers"
    definition: Json | None = None
    notes: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """Number of samples by split name."""
        return {name: len(samples) for name, samples in self.splits.items()}

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over the canonical JSON of all that decides a number; no absolute path is in it."""
        whole = hashlib.sha256(_canonical(self._header()))
        for name in sorted(self.splits):
            for sample in self.splits[name]:
                whole.update(b"\n" + name.encode() + b" " + _canonical(sample.to_json()))
        return whole.hexdigest()

    def _header(self) -> dict[str, object]:
        # left out where it is the default, so that manifests drawn before the field have the same digest
        later = {"prompt": self.prompt, "definition": self.definition}
        return {
            **{name: value for name, value in later.items() if value not in ("papers", None)},
            "format": FORMAT,
            "task": self.task,
            "seed": self.seed,
            "sizes": self.sizes,
            "sources": [vars(source) for source in self.sources],
            "replaced": list(self.replaced),
        }

    def verify_images(self) -> None:
        """Check that every image is there, opens, and has the bytes it had when the manifest was drawn.

        Raises:
            InputError: lists every image that does not.
        """
        wanted = {
            self.image_root / image.path: image.sha256
            for name in SPLITS
            for sample in self.splits.get(name, ())
            for image in sample.images
        }
        bad = []
        for checked in check_images(wanted):
            expected = wanted[checked.path]
            if checked.problem is not None:
                bad.append(checked)
            elif expected and checked.sha256 != expected:
                bad.append(replace(checked, problem=changed(checked.sha256, expected)))
        if bad:
            raise problems_error(bad, where=f"manifest of {self.task}")

    def check_digest(self, wanted: str, *, where: Path, way_out: str) -> None:
        """Check that these are the samples that a trial was made from.

        Raises:
            InputError: they are not; `where` they lie is said, and the `way_out`.
        """
        if self.digest != wanted:
            raise InputError(
                f"the data changed: digest {self.digest[:12]}, the trial was made from {wanted[:12]}",
                where=str(where),
                way_out=way_out,
            )

    def save(self, path: Path) -> None:
        """Write the manifest: JSON, sorted keys, one sample a line; the file appears whole or not at all."""
        write_atomic(Path(path), "".join(self._lines()))

    def _lines(self) -> Iterator[str]:
        header = {**self._header(), "digest": self.digest, "image_root": str(self.image_root)}
        if self.notes:
            header["notes"] = list(self.notes)
        yield "{\n"
        for key in sorted(header):
            yield f"{json.dumps(key)}: {json.dumps(header[key], ensure_ascii=False, sort_keys=True)},\n"
        yield '"splits": {'
        for number, name in enumerate(sorted(self.splits)):
            yield f"{',' if number else ''}\n{json.dumps(name)}: ["
            for row, sample in enumerate(self.splits[name]):
                record = sample.to_json()
                line = json.dumps({**record, "check": _check(record)}, ensure_ascii=False, sort_keys=True)
                yield f"{',' if row else ''}\n{line}"
            yield "\n]"
        yield "\n}\n}\n"

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read the manifest that `save` wrote, and verify its digest.

        Raises:
            InputError: the file is missing, no manifest, of another format, or not what was written; the
                line or the sample that differs is named.
            WorkError: the system does not let it be read now.
        """
        place = str(path)
        again = "Draw it again with the subsample stage"
        try:
            text = Path(path).read_bytes().decode("utf-8")
            record = json.loads(text)
        except OSError as error:
            raise read_error(error, f"the manifest cannot be read ({error.strerror})", place, again) from error
        except UnicodeDecodeError as error:
            raise InputError(f"is not UTF-8 (byte {error.start})", where=place, way_out=again) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"is not valid JSON: {error}", where=place, way_out=again) from error
        if not isinstance(record, dict) or "splits" not in record or "digest" not in record:
            raise InputError("is no manifest (no 'splits' or 'digest')", where=place, way_out=again)
        if record.get("format") != FORMAT:
            raise InputError(
                f"has format {record.get('format')}, this version reads {FORMAT}", where=place, way_out=again
            )
        _verify_samples(record["splits"], text, place)
        try:
            manifest = cls(
                task=record["task"],
                seed=record["seed"],
                sources=tuple(Source(**source) for source in record["sources"]),
                splits={
                    name: tuple(Sample.from_json(sample) for sample in samples)
                    for name, samples in record["splits"].items()
                },
                image_root=Path(record["image_root"]),
                replaced=tuple(record["replaced"]),
                prompt=record.get("prompt", "papers"),
                definition=record.get("definition"),
                notes=tuple(record.get("notes", ())),
            )
            _verify_paths(manifest, place)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"a field is missing or misnamed ({error})", where=place, way_out=again) from error
        if record.get("sizes") != manifest.sizes:
            raise InputError(
                f"'sizes' says {record.get('sizes')}, the splits hold {manifest.sizes}", where=place, way_out=again
            )
        if manifest.digest != record["digest"]:
            raise InputError(
                "the digest does not match: the header (task, seed, sources, order or number of samples) or the "
                "digest itself was changed",
                where=place,
                way_out=again,
            )
        return manifest


def _verify_paths(manifest: Manifest, where: str) -> None:
    """Refuse a path that leads out of the data root: a manifest is a file that people hand to each other."""
    images = {image.path for samples in manifest.splits.values() for sample in samples for image in sample.images}
    for path in sorted(images | {source.path for source in manifest.sources}):
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path:
            way_out = "Draw the manifest here, by the subsample stage"
            raise InputError(f"the path {path!r} leads out of the data root", where=where, way_out=way_out)


def _canonical(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":")).encode()


def _check(record: Mapping[str, Any]) -> str:
    """Return a short check of one sample, which finds the damaged line when the digest is wrong."""
    return hashlib.sha256(_canonical(record)).hexdigest()[:12]


def _verify_samples(splits: Any, text: str, where: str) -> None:
    if not isinstance(splits, dict) or not all(isinstance(samples, list) for samples in splits.values()):
        raise InputError("'splits' must hold lists of samples", where=where, way_out="Draw it again")
    bad = []
    for name, samples in splits.items():
        for row, record in enumerate(samples):
            stated = record.pop("check", None) if isinstance(record, dict) else None
            if stated is None or stated != _check(record):
                sample_id = record.get("sample_id") if isinstance(record, dict) else None
                bad.append(f"{name}[{row}] (sample {sample_id})" + _line_of(text, stated))
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        way_out = "The file was edited or damaged; draw it again with the subsample stage"
        raise InputError(f"{len(bad)} sample(s) are not what was written: {shown}", where=where, way_out=way_out)


def _line_of(text: str, check: object) -> str:
    at = text.find(f'"check": "{check}"') if check else -1
    return f" on line {text.count(chr(10), 0, at) + 1}" if at >= 0 else ""


def training_samples(manifest: Manifest, config: TrialConfig) -> Sequence[Sample]:
    """Return the `num_train_samples` samples that a trial trains on and draws demonstrations from.

    They are in the split's order. `sample_draw: first` takes the first ones, the same for every seed. `by-seed` draws
    them by the trial's seed, so that a spread over seeds has that of the sample in it; a smaller draw lies within a
    larger one of the same seed.
    """
    split = manifest.splits["train"]
    if config.sample_draw == "first":
        return split[: config.num_train_samples]
    drawn = list(range(len(split)))
    random.Random(f"sample_draw/{config.seed}").shuffle(drawn)
    return [split[i] for i in sorted(drawn[: config.num_train_samples])]
