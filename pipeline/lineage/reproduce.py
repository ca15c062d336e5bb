"""`hificl reproduce`: a run's own record, trained and evaluated again, and the two numbers side by side."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import backbones
from pipeline.config.load import Params
from pipeline.core.errors import InputError
from pipeline.core.progress import say
from pipeline.data.manifest import Manifest
from pipeline.lineage.record import RunRecord, read_record
from pipeline.lineage.rerun import Again, rerun
from pipeline.lineage.worktree import check_code, checked_out
from pipeline.records.evaluation import Evaluation
from pipeline.tracking.client import Tracker
from pipeline.tracking.provenance import code_root, code_version, machine, versions

# what a score may differ by where sums come in another order: on a GPU, over ranks, in a pack, on another processor
TOLERANCES = {"percent": 1.0, "fraction": 0.02}
_MEASURED = ("seconds", "memory_bytes")  # metrics that end so are measurements of the machine


def reproduce(
    run_id: str, params: Params, root: Path, *, tolerance: float | None = None, here: bool = False,
    keep: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train and evaluate a run again by its own record, in a private store, and compare.

    Args:
        run_id: an MLflow run of a finished trial.
        params: the project's: where weights lie, and which tracking store.
        root: the project's folder.
        tolerance: what the numbers may differ by; None: 0 for a run in one process on this CPU, else `TOLERANCES`.
        here: run the code as it is now instead of the run's commit.
        keep: keep the private store in this folder.

    Returns:
        `number` (`recorded`, `again`, `difference`), `others`, `adapter`, `predictions`, `code`, `environment`,
        `tolerance` and `reproduced`.

    Raises:
        InputError: said before any work: data, weights or code are not what the run recorded.
        WorkError: the second run failed.
    """
    record = read_record(Tracker(params.tracking.uri, root), run_id)
    manifest = _same_data(record, root)
    _same_weights(record, params)
    repository = code_root(root)
    if not here:
        check_code(repository, record.provenance, run_id)
    allowed = _tolerance(record) if tolerance is None else tolerance
    environment = _environment(record, repository, here)
    for note in environment["notes"]:
        say(note)
    say(f"training {record.config['method']} on {record.config['task']} again, seed {record.config['seed']}")
    with _folder(keep) as private:
        if here:
            again = rerun(record, params, manifest, repository, private / "store")
        else:
            with checked_out(repository, record.provenance, private / "code") as code:
                again = rerun(record, params, manifest, code, private / "store")
    return {**_compared(record, again, allowed), "environment": environment}


def _same_data(record: RunRecord, root: Path) -> Manifest:
    path = root / "data/manifests" / record.config["task"] / "manifest.json"
    manifest = Manifest.load(path)
    way_out = "Put the old params of stage subsample and the old files back and draw again"
    manifest.check_digest(record.config["manifest_digest"], where=path, way_out=way_out)
    manifest.verify_images()
    return manifest


def _same_weights(record: RunRecord, params: Params) -> None:
    name, wanted = record.config["backbone"], record.config["backbone_digest"]
    found = backbones.digest_of(name, params.backbone_source(name))
    if found != wanted:
        raise InputError(
            f"the weights changed: digest {found[:12]}, the run was made with {wanted[:12]}",
            where=f"backbones.{name}", way_out="Put the old weights back",
        )  # fmt: skip


def _tolerance(record: RunRecord) -> float:
    # `packed` is with how many trials it really shared a pass; runs of before it was kept say what was allowed
    packed = record.tags.get("packed") or record.tags.get("pack", "1")
    alone = record.config.get("world_size", 1) == 1 and packed == "1"
    gpus = record.provenance.machine.gpus
    solo = alone and not gpus and _other_processor(record) is None
    unit = record.evaluation.unit if record.evaluation else "percent"
    return 0.0 if solo else TOLERANCES.get(unit, TOLERANCES["percent"])


def _other_processor(record: RunRecord) -> str | None:
    """Return the processor that a run was made on, where it is not this machine's."""
    recorded = record.provenance.machine.cpu
    return recorded if recorded not in (None, machine()["cpu"]) else None


def _environment(record: RunRecord, repository: Path, here: bool) -> dict[str, Any]:
    origin = record.provenance
    notes = []
    if here:
        now = code_version(repository)
        notes.append(f"running the code as it is now ({now['commit'] or now['note']}), not the run's own")
        if now["dirty"]:
            notes.append(f"this tree is dirty: {', '.join(now['changed'][:5])}")
    elif origin.dirty:
        lines = origin.diff.count("\n")
        notes.append(f"the run was made from a dirty tree: its own diff of {lines} lines is laid over the commit")
    earlier = record.tags.get("git.earlier_commits")
    if earlier:
        notes.append(f"the run was begun by other code ({earlier}) and resumed")
    present, before = versions(), origin.versions
    differ = {name: [before[name], present.get(name)] for name in before if before[name] != present.get(name)}
    if differ:
        pairs = ", ".join(f"{name} {old} (now {new})" for name, (old, new) in differ.items())
        notes.append(f"other versions than the run's: {pairs}")
    other = _other_processor(record)
    if other is not None:
        notes.append(f"another processor than the run's, {other}: it sums in another order")
    return {"notes": notes, "versions_differ": differ, "recorded_machine": origin.machine.model_dump()}


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        if keep.exists() and any(keep.iterdir()):
            raise InputError("the folder is not empty", where=str(keep), way_out="Give --keep another folder")
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    private = Path(tempfile.mkdtemp(prefix="hificl-reproduce-"))
    try:
        yield private
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _compared(record: RunRecord, again: Again, allowed: float) -> dict[str, Any]:
    first, second = record.metrics, again.metrics
    number: dict[str, Any] | None
    shared = sorted(name for name in first if name in second and not name.endswith(_MEASURED) and "/" not in name)
    others = {name: _pair(first[name], second[name]) for name in shared}
    if record.evaluation and again.evaluation:
        metric, unit = record.evaluation.metric, record.evaluation.unit
        number = _pair(_value(record.evaluation), _value(again.evaluation))
    else:
        metric, unit = "objective", None
        number = others.get("objective")
    worst = max([abs(pair["difference"]) for pair in (*others.values(), *([number] if number else []))], default=0.0)
    gap = abs(number["difference"]) if number else worst
    return {
        "run_id": record.run_id, "trial": record.key, "metric": metric, "unit": unit, "number": number,
        "others": others, "largest_difference": worst, "tolerance": allowed,
        # without a tolerance everything has to be equal, losses too; with one the number is what it is about
        "reproduced": worst == 0.0 if allowed == 0.0 else gap <= allowed,
        "adapter": _adapters(record, again), "predictions": _predictions(record, again),
        "code": {"recorded": record.provenance.commit, "ran": again.commit},
    }  # fmt: skip


def _value(evaluation: Evaluation) -> float:
    return math.nan if evaluation.value is None else evaluation.value


def _pair(recorded: float, again: float) -> dict[str, Any]:
    first, second = (value if math.isfinite(value) else str(value) for value in (recorded, again))
    # no number twice (a norm that an engine does not give) is no difference; once, it is one without bound
    finite = math.isfinite(recorded) and math.isfinite(again)
    gap = again - recorded if finite else 0.0 if first == second else math.inf
    return {"recorded": first, "again": second, "difference": gap}


def _adapters(record: RunRecord, again: Again) -> dict[str, Any] | None:
    recorded = record.tags.get("adapter_digest")
    if recorded is None:
        return None
    return {"recorded": recorded, "again": again.adapter_digest, "same": recorded == again.adapter_digest}


def _predictions(record: RunRecord, again: Again) -> dict[str, int] | None:
    if not (record.evaluation and again.evaluation):
        return None
    mine = {str(answer.sample_id): answer.prediction for answer in record.evaluation.predictions}
    theirs = {str(answer.sample_id): answer.prediction for answer in again.evaluation.predictions}
    return {"samples": len(mine), "differ": sum(theirs.get(name) != text for name, text in mine.items())}
