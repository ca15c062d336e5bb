"""A task's samples by params.yaml: what the stage `subsample` does for each task."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipeline.config.load import Params, data_root
from pipeline.core.errors import InputError
from pipeline.core.plain_yaml import read_file
from pipeline.core.progress import Report, bar, say
from pipeline.data.image_files import CheckedImage, check_images, problems_error
from pipeline.data.manifest import Manifest, Source
from pipeline.data.official import source_digest
from pipeline.data.sample import PromptStyle, Sample
from pipeline.plan.plan import Places, places
from pipeline.tasks import IndexEntry, SampleId, Split, Task, tasks
from pipeline.tasks.mixture import Mixture


def draw_task(params: Params, task: str, root: Path | None = None) -> None:
    """Draw the samples of `task` and write its manifest; a mixture's come from its tasks' manifests.

    Raises:
        InputError: files are missing, damaged or too few; a mixture's task has no manifest.
    """
    given, folders = params.subsample, places(root)
    if isinstance(mixture := tasks.get(task), Mixture):
        _mixed(params, mixture, folders).save(folders.manifest(task))
        return
    sizes, divided = given.of(task), tasks.get(task).with_splits(given.splits.get(task, "official"))
    with bar(f"subsample {task}") as progress:
        manifest = draw_manifest(
            divided, data_root(params), seed=given.seed, num_train=sizes.num_train, num_selection=sizes.num_selection,
            num_evaluation=None if sizes.num_evaluation == "whole" else sizes.num_evaluation,
            training_answer=given.training_answer, prompt=given.prompt, progress=progress,
        )  # fmt: skip
    manifest.save(folders.manifest(task))
    for line in (*manifest.notes, *(_unwatched(manifest, root or Path.cwd()) if divided.definition else ())):
        say(f"{task}: {line}")


def _mixed(params: Params, mixture: Mixture, folders: Places) -> Manifest:
    sizes = params.subsample.of(mixture.name)
    whole = None if sizes.num_evaluation == "whole" else sizes.num_evaluation
    return mixture.mix(
        [Manifest.load(folders.manifest(part.name)) for part in mixture.parts],
        {"train": sizes.num_train, "selection": sizes.num_selection, "evaluation": whole},
    )


def _unwatched(manifest: Manifest, root: Path) -> Iterator[str]:
    """Say which of the user's own files DVC does not see change."""
    pipeline = root / "dvc.yaml"
    deps = read_file(pipeline)["stages"]["subsample"].get("deps", []) if pipeline.is_file() else []
    watched = [(root / dep).resolve() for dep in deps]
    for source in manifest.sources:
        file = (root / manifest.image_root / source.path).resolve()
        if deps and not any(file.is_relative_to(dep) for dep in watched):
            yield f"note: DVC does not see {file} change: put it below data/real, or under subsample's deps in dvc.yaml"


_SELECTION_SIDE = "0123"
_NAMED = 5  # pictures of one note


def _silent(done: int, total: int | None = None, note: str = "") -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Candidates:
    """Samples of one split in the order in which they are taken; longer than needed where images repeat."""

    split: str
    wanted: int
    entries: Sequence[IndexEntry]


def draw_manifest(
    task: Task,
    root: Path,
    *,
    seed: int,
    num_train: int,
    num_selection: int,
    num_evaluation: int | None = None,
    training_answer: Literal["most-frequent", "first"] = "most-frequent",
    prompt: PromptStyle = "papers",
    progress: Report | None = None,
) -> Manifest:
    """Draw the three splits of `task` from the official files under `root`.

    Every drawn image is read and decoded to its end.

    Args:
        task: the task.
        root: the data root; image paths in the manifest are relative to it.
        seed: decides everything that is left open.
        num_train: samples to train on.
        num_selection: samples to choose epoch and hyperparameters on.
        num_evaluation: samples to report on; None for all of the official split.
        training_answer: what a training step should produce: the most frequent of the references, or the first (the
            published code's choice); demonstrations show the most frequent either way.
        prompt: whose wording the prompts have.
        progress: of images and answers, as `pipeline.core.progress.bar` gives it; called on the calling thread.

    Returns:
        The manifest, with the digest of every source file and every image.

    Raises:
        InputError: a file is missing, damaged or of another split; a question has no annotation; fewer
            samples than asked for; images missing or broken (all of them in one error).
    """
    root = Path(root)
    report = progress or _silent
    _check_sizes(task, num_train, num_selection, num_evaluation)
    with ThreadPoolExecutor(max_workers=1) as thread:  # hashing releases the GIL: it runs beside the parsing
        paths = sorted({path for split in task.pools(root) for path in task.files(root, split)})
        digests = thread.map(source_digest, paths)
        candidates = plan_draw(
            task,
            root,
            seed=seed,
            num_train=num_train,
            num_selection=num_selection,
            num_evaluation=num_evaluation,
            report=report,
        )
        chosen, images, replaced, passed = _take(task, root, candidates, report)
        splits = _read(task, root, chosen, images, report)
        if training_answer == "first":
            splits = {name: tuple(map(_first_answer, samples)) for name, samples in splits.items()}
        sources = tuple(
            Source(path.relative_to(root).as_posix(), digest, path.stat().st_size)
            for path, digest in zip(paths, digests, strict=True)
        )
    notes = (*task.notes(root), *passed)
    return Manifest(task.name, seed, sources, splits, root, tuple(replaced), prompt, task.definition, notes)


def _first_answer(sample: Sample) -> Sample:
    first = sample.references[0]
    return sample if first == sample.target else replace(sample, target=first, demonstration=sample.target)


def sample_key(seed: int, task: str, sample_id: SampleId) -> bytes:
    """Return the 32 bytes that place a sample in the draw's order."""
    return hashlib.sha256(f"{seed}:{task}:{sample_id}".encode()).digest()


def _order(seed: int, task: str, entry: IndexEntry) -> tuple[bytes, bytes]:
    key = sample_key(seed, task, entry.sample_id)
    return (key, b"") if entry.group is None else (sample_key(seed, task, entry.group), key)


def _on_selection_side(seed: int, task: str, image: str) -> bool:
    file, mark, cell = image.partition("#")  # an image inside a Parquet shard has "#<row>/<column>"
    name = file.rsplit("/", 1)[-1] + mark + cell
    return hashlib.sha256(f"{seed}:{task}:image:{name}".encode()).hexdigest()[0] in _SELECTION_SIDE


def _check_sizes(task: Task, num_train: int, num_selection: int, num_evaluation: int | None) -> None:
    sizes = {"num_train": num_train, "num_selection": num_selection, "num_evaluation": num_evaluation}
    for name, size in sizes.items():
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 0):
            raise InputError(f"{name} is {size!r}", where=task.name, way_out="It must be a whole number, 0 or more")
    if num_train + num_selection == 0 and num_evaluation == 0:
        way_out = "Ask for at least one sample"
        raise InputError("num_train, num_selection and num_evaluation are all 0", where=task.name, way_out=way_out)


def plan_draw(
    task: Task,
    root: Path,
    *,
    seed: int,
    num_train: int,
    num_selection: int,
    num_evaluation: int | None,
    report: Report = _silent,
) -> list[Candidates]:
    """Return every split's candidates, without looking at an image or an answer.

    The splits stand in the order in which they choose: the earlier one keeps an image that two would take.
    """
    pools = {split: _index(task, root, split, seed, report) for split in task.pools(root)}
    evaluation = pools["evaluation"]
    train, selection = _sides(task, seed, pools.get("train", evaluation))
    if "selection" in pools:
        train, selection = pools["train"], pools["selection"]
    size = len(evaluation) if num_evaluation is None else num_evaluation
    for_training = [Candidates("train", num_train, train), Candidates("selection", num_selection, selection)]
    if task.one_pool:
        rest = -1 if num_evaluation is None else num_evaluation  # all that the other two leave
        return [*for_training, Candidates("evaluation", rest, evaluation)]
    return [Candidates("evaluation", size, evaluation), *for_training]


def _index(task: Task, root: Path, split: Split, seed: int, report: Report) -> list[IndexEntry]:
    entries = []
    for entry in task.index(root, split):
        entries.append(entry)
        if len(entries) % 20_000 == 0:
            report(len(entries), note=f"{task.name}: reading the {split} questions")
    if not entries:
        names = ", ".join(str(path) for path in task.files(root, split))
        raise InputError(f"the {split} split is empty", where=names, way_out="Get the official file again")
    entries.sort(key=lambda entry: _order(seed, task.name, entry))
    return entries


def _sides(task: Task, seed: int, pool: Sequence[IndexEntry]) -> tuple[list[IndexEntry], list[IndexEntry]]:
    """Return training's and selection's candidates: the own side first, then the other from its far end."""
    side: dict[str, bool] = {}
    sides: dict[bool, list[IndexEntry]] = {False: [], True: []}
    for entry in pool:
        image = entry.group or (entry.images[0] if entry.images else str(entry.sample_id))
        if image not in side:
            side[image] = _on_selection_side(seed, task.name, image)
        sides[side[image]].append(entry)
    return sides[False] + sides[True][::-1], sides[True] + sides[False][::-1]


def _take(
    task: Task, root: Path, plan: Sequence[Candidates], report: Report
) -> tuple[dict[str, list[IndexEntry]], dict[str, CheckedImage], list[dict[str, object]], list[str]]:
    """Let each split take its samples: no image, by path or by bytes, and no group goes to two of them.

    Of a file that says itself which split a row is of, it is noted how many rows another split's image cost.
    """
    source, passed = _pool_of_each(task, root), Counter[str]()
    checked: dict[str, CheckedImage] = {}
    owner: dict[str, str] = {}  # image path or digest, or a group -> the split that has it
    chosen: dict[str, list[IndexEntry]] = {}
    replaced: list[dict[str, object]] = []
    broken: dict[SampleId, list[CheckedImage]] = {}  # rows whose pictures cannot be read
    for candidates in plan:
        name = candidates.split
        free = _free(candidates, owner, source, passed)
        taken: list[IndexEntry] = []
        while batch := list(_first(free, candidates.wanted - len(taken) if candidates.wanted >= 0 else None)):
            _check(root, batch, checked, report, name)
            for entry in batch:
                unread = [checked[image] for image in entry.images if checked[image].problem is not None]
                if unread:
                    broken[entry.sample_id] = unread
                    if task.leaves_out:
                        continue
                taker = next((owner[checked[i].sha256] for i in entry.images if checked[i].sha256 in owner), name)
                if taker != name:
                    replaced.append({"sample_id": entry.sample_id, "split": name, "same_image_in": taker})
                else:
                    taken.append(entry)
        if len(taken) < candidates.wanted or (candidates.wanted < 0 and not taken):
            raise _too_few(task, candidates, len(taken), chosen)
        for entry in taken:
            owner.update(dict.fromkeys(kept_together(entry), name))
            for image in entry.images:
                if checked[image].sha256:
                    owner[checked[image].sha256] = name
        chosen[name] = taken
    bad = list(dict.fromkeys(image for unread in broken.values() for image in unread))
    rows = task.places(root, [path for path, image in checked.items() if image in bad]) if bad else {}
    named_by = {checked[path].path: row for path, row in rows.items()}
    if bad and not task.leaves_out:
        raise problems_error(bad, where=task.name, named_by=named_by)
    lost = [f"{len(broken)} rows are left out, whose picture cannot be read: {_named(bad, named_by)}"] if bad else []
    lost += [
        f"{count} rows of {name} share an image or a group with another split: passed over"
        for name, count in passed.items()
    ]
    return chosen, checked, replaced, lost if task.definition is not None else []


def _named(bad: Sequence[CheckedImage], rows: Mapping[Path, str]) -> str:
    """Return the first pictures that cannot be read, with the rows that name them and why."""
    shown = [f"{rows.get(image.path, image.path)}: {image.problem}" for image in bad[:_NAMED]]
    return "; ".join(shown) + (f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")


def _pool_of_each(task: Task, root: Path) -> dict[str, Split]:
    """Return the pool that each of the three splits is drawn from."""
    pools = task.pools(root)
    train: Split = "train" if "train" in pools else "evaluation"
    return {"train": train, "selection": "selection" if "selection" in pools else train, "evaluation": "evaluation"}


def _free(
    candidates: Candidates, owner: Mapping[str, str], source: Mapping[str, Split], passed: Counter[str]
) -> Iterator[IndexEntry]:
    """Give the entries that share nothing with another split; those that do with another pool are counted."""
    for entry in candidates.entries:
        takers = {owner[thing] for thing in kept_together(entry) if thing in owner}
        if not takers:
            yield entry
        elif any(source[taker] != source[candidates.split] for taker in takers):
            passed[candidates.split] += 1


def kept_together(entry: IndexEntry) -> Iterator[str]:
    """Give what no two splits may share of an entry."""
    yield from entry.images
    if entry.group is not None:
        yield f"group {entry.group}"


def _first(entries: Iterator[IndexEntry], count: int | None) -> Iterator[IndexEntry]:
    if count is None:
        yield from entries
        return
    for _ in range(count):
        entry = next(entries, None)
        if entry is None:
            return
        yield entry


def _check(
    root: Path, entries: Iterable[IndexEntry], checked: dict[str, CheckedImage], report: Report, split: str
) -> None:
    new = list(dict.fromkeys(image for entry in entries for image in entry.images if image not in checked))
    done = 0

    def one_more(count: int) -> None:
        nonlocal done
        done += count
        if done % 500 == 0 or done == len(new):
            report(done, len(new), f"checking the {split} images")

    results = check_images([root / image for image in new], progress=one_more)
    checked.update(zip(new, results, strict=True))


def _too_few(task: Task, candidates: Candidates, available: int, chosen: dict[str, list[IndexEntry]]) -> InputError:
    total = len(candidates.entries)
    images = len({image for entry in candidates.entries for image in entry.images})
    taken = ", ".join(f"{name} takes {len(entries)}" for name, entries in chosen.items() if entries)
    shared = f"; {taken}, and no image may be in two splits" if taken else ""
    asked = candidates.wanted if candidates.wanted >= 0 else "all the remaining"
    return InputError(
        f"{asked} {candidates.split} samples were asked for, {available} are available "
        f"({total} samples on {images} images{shared})",
        where=task.name,
        way_out=f"Lower num_{candidates.split} to {available} or less, lower the other sizes, or get the full files",
    )


def _read(
    task: Task, root: Path, chosen: dict[str, list[IndexEntry]], images: dict[str, CheckedImage], report: Report
) -> dict[str, tuple[Sample, ...]]:
    """Read the chosen samples, in the draw's order, with the digests of their images."""
    samples: dict[tuple[Split, SampleId], Sample] = {}
    source = _pool_of_each(task, root)
    for split in task.pools(root):
        only = {entry.sample_id for name in chosen if source[name] == split for entry in chosen[name]}
        report(0, len(only), f"{task.name}: reading the {split} answers")
        for sample in task.read(root, split, only):
            refs = tuple(replace(image, sha256=images[image.path].sha256) for image in sample.images)
            samples[split, sample.sample_id] = replace(sample, images=refs)
        report(len(only), len(only), f"{task.name}: reading the {split} answers")
    return {
        name: tuple(samples[source[name], entry.sample_id] for entry in entries) for name, entries in chosen.items()
    }
