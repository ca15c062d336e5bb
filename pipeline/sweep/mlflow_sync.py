"""MLflow kept equal to the trial store and the evaluations, live and by what lies on the disk; what it is told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial

from pipeline import methods
from pipeline.config.load import Params
from pipeline.config.schema import SOURCE_TASK
from pipeline.config.trial import TrialConfig, canonical, digest
from pipeline.core.errors import HificlError, WorkError
from pipeline.core.files import folder_digest
from pipeline.core.progress import say
from pipeline.plan.plan import Places, Plan
from pipeline.plan.space import Cell
from pipeline.pool.messages import Watcher
from pipeline.records import Unseen, say_once
from pipeline.records.evaluation import CodeVersion, Evaluation, Evaluations
from pipeline.records.store import TrialStore
from pipeline.records.trial import EpochReport, TrialEnd
from pipeline.tracking import store as run_store
from pipeline.tracking.client import Tracker
from pipeline.tracking.records import FAILED, FINISHED, KILLED, LoggedRun, MetricPoint, RunInput, TrialRunStart
from pipeline.tracking.registry import ModelCandidate, ModelRegistry, log_adapter

ENDS = {"finished": FINISHED, "diverged": FAILED, "failed": FAILED, "stopped": KILLED}
COSTS = ("trainable_parameters", "train_seconds", "train_flops", "peak_memory_bytes")  # of a trained trial
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds between two tries to reach a store that is away
# scores on the selection split can be compared where these agree
_PROTOCOL = ("backbone_digest", "manifest_digest", "selection", "selection_metric", "num_selection_samples")


class MlflowSync(Watcher):
    """One MLflow run a trial, below the parent of the study that asked for it first; each score with its trial's runs.

    Each piece of work looks at the disk and adds what MLflow lacks, so it may be done again at any time. A store that
    goes away stops nothing: what it lacks is noted, and added when it answers again, in `settle`, or by the next start,
    which compares.

    Attributes:
        parents: the sweeps' runs by study, once they are open.
    """

    def __init__(self, tracker: Tracker, store: TrialStore, plan: Plan, studies: Sequence[str]) -> None:
        self.tracker, self.store, self.plan, self.studies = tracker, store, plan, studies
        self.evaluations = Evaluations(plan.places.runs.parent / "evaluations")
        self._several = len({cell.backbone for cell in plan.cells.values()}) > 1
        self.parents: dict[str, str] = {}
        self._runs: dict[str, str] = {}  # by trial
        self._ended: dict[str, TrialEnd] = {}  # what MLflow has of trials' ends
        self._scored: dict[str, list[LoggedRun]] = {}  # runs by trial, as `find_runs` saw them
        self._lacking: dict[str, Callable[[], None]] = {}
        self._wait, self._next_try, self._cause = FIRST_WAIT, 0.0, ""

    # -- sweeps ------------------------------------------------------------------------------------------------------

    def open_sweeps(self) -> None:
        """Open the parent run of each study.

        Raises:
            WorkError: the store is away, before anything was trained.
        """
        for study in self.studies:
            self._open_sweep(study)

    def close_sweeps(self, *, failed: bool) -> None:
        """End the parents."""
        for study, parent in self.parents.items():
            self._bring(f"sweep {study}", partial(self.tracker.close, parent, FAILED if failed else FINISHED))

    def record_done(self, keys: Collection[str], *, later: bool = False) -> None:
        """Log trials that the store has done; those whose runs say so already are passed over, a thousand at a look.

        With `later` it is done before what is heard next: of 5,000 trials MLflow takes ten seconds to tell what it has,
        for which no slot should wait.
        """
        name, work = "trials that are done", partial(self._record_done, frozenset(keys))
        if keys and later:
            self._lacking[name] = work
        elif keys:
            self._bring(name, work)

    # -- a watcher of `supervisor.train` -----------------------------------------------------------------------------

    def on_start(self, key: str) -> None:
        """Open the trial's run, or take the one that an earlier sweep began."""
        self._bring(key, partial(self._record, key))

    def on_report(self, key: str, report: EpochReport) -> None:
        """Log what the trial's ledger has and its run has not: this epoch, and those that the store missed."""
        self._bring(key, partial(self._record, key))

    def on_end(self, key: str, error: str | None) -> None:
        """Log what is missing and end the run."""
        self._bring(key, partial(self._record, key))

    # -- evaluations -------------------------------------------------------------------------------------------------

    def find_runs(self, trials: Collection[str]) -> None:
        """Find out which runs each trial has, before `trials` are scored.

        A sweep whose end MLflow has not seen, and a trial without any run, are brought in line first.

        Raises:
            WorkError: the store is away.
        """
        every = set(self.store.all_keys())
        self._scored = self.tracker.runs_of(every)
        mended = False
        for study in self.studies:
            keys = self._keys(study)
            sweep = self.tracker.find_sweep(study, _sweep_key(keys))
            cut_off = sweep is not None and sweep.status not in (FINISHED, FAILED)
            if cut_off or (keys & set(trials)) - self._scored.keys():
                ends = {key: end.status for key in keys if (end := self.store.done(key)) is not None}
                self._open_sweep(study)
                self.record_done(ends)
                self.settle(0.0)
                whole = FAILED if "failed" in ends.values() else FINISHED
                self.tracker.close(self.parents[study], whole if ends.keys() == keys else KILLED)
                mended = True
        if mended:  # else the runs are those that were just found: a search takes seconds where there are thousands
            self._scored = self.tracker.runs_of(every)

    def with_origin(self, evaluation: Evaluation) -> Evaluation:
        """Return a score with the newest run of its trial, the adapter's digest and the code that scored."""
        runs, code = self._scored.get(evaluation.trial), self.tracker.provenance
        trial = self.store.trial(evaluation.trial)
        trial.check_adapter()
        return evaluation.model_copy(
            update={
                "run_id": runs[-1].run_id if runs else None,
                "scored_by": CodeVersion(commit=code.commit, dirty=code.dirty),
                "adapter_digest": folder_digest(trial.adapter),
            }
        )

    def score(self, config: TrialConfig, key: str) -> None:
        """Log an evaluation's scores, costs, samples and some answers with every run of its trial that lacks it."""
        lacking = [run.run_id for run in self._scored.get(config.key, []) if key not in run.evaluations]
        if lacking:
            self._bring(key, partial(self._log_score, config, key, lacking))

    def measurement(self, key: str) -> None:
        """Log a measurement by its file with the run that it names, or the trial's newest, where that lacks it."""
        measurement = self.evaluations.find_measurement(key)
        if measurement is None:
            return
        runs = self._scored.get(measurement.trial, [])
        for run in [run for run in runs if run.run_id == measurement.run_id] or runs[-1:]:
            if key not in run.evaluations:
                self._bring(key, partial(self._log_measurement, run.run_id, key, measurement.numbers))

    def register(self, trials: Iterable[str | None]) -> None:
        """Register the adapters of the chosen trials; a store that refuses is said and stops nothing.

        The numbers are written already, and the next evaluation registers what is missing.
        """
        chosen = [key for key in dict.fromkeys(trials) if key and (self.store.folder(key) / "adapter").is_dir()]
        self._bring("models", partial(self._register, chosen))

    # -- a store that is away ----------------------------------------------------------------------------------------

    def settle(self, patience: float) -> None:
        """Add everything that MLflow lacks; wait `patience` seconds for the store if it is away.

        What has just been written on another machine and is not seen here yet is waited for, a minute at most.

        Raises:
            WorkError: it did not come back; the message names the store, what it lacks, and where that is kept.
        """
        until = time.monotonic() + patience
        while not self._catch_up():
            if self._cause and time.monotonic() >= until:
                raise WorkError(
                    f"the MLflow store is away ({self._cause}); it lacks metrics, tags or models of up to "
                    f"{len(self._lacking)} runs, which are kept in {self.store.root} and evaluations/",
                    where=self.tracker.address,
                    way_out="Bring the store back and run the same command again: it adds them and trains nothing",
                )
            if not self._cause:
                say_once(f"waiting for files of {len(self._lacking)} trials, which this machine does not see yet")
            time.sleep(FIRST_WAIT)

    def _bring(self, name: str, work: Callable[[], None]) -> None:
        """Do a piece of work, or note it for later while the store is away; what was noted before it goes first."""
        self._lacking[name] = work
        if time.monotonic() >= self._next_try:
            self._catch_up()

    def _catch_up(self) -> bool:
        """Do what was noted, in order, and what is not seen yet later; return whether nothing is left."""
        unseen: dict[str, Callable[[], None]] = {}
        try:
            if self._cause:
                run_store.probe(self.tracker.uri)  # within seconds, where MLflow itself would try for longer
            while self._lacking:
                name, work = next(iter(self._lacking.items()))
                try:
                    work()
                except Unseen:
                    unseen[name] = work
                del self._lacking[name]
        except run_store.AWAY as error:
            if not self._cause:
                say(f"the MLflow store is away, what it lacks is added from {self.store.root} later: {error.what}")
            self._cause = error.what
            self._next_try, self._wait = time.monotonic() + self._wait, min(2 * self._wait, LONGEST_WAIT)
            self.tracker.forget_steps()  # what failed may have been carried out all the same
            return False
        finally:
            self._lacking |= unseen
        if self._cause:
            say("the MLflow store answers again and has everything")
        self._cause, self._wait = "", FIRST_WAIT
        return not self._lacking

    # -- pieces of work ----------------------------------------------------------------------------------------------

    def _open_sweep(self, study: str) -> None:
        keys, params = self._keys(study), self.plan.params
        tags, load = {"sweep_key": _sweep_key(keys), "profile": params.profile}, params.tracking.system_metrics
        note = sweep_note(params, study, len(keys))
        self.parents[study] = self.tracker.open_sweep(study, tags=tags, description=note, system_metrics=load)

    def _keys(self, study: str) -> set[str]:
        return {key for key, cell in self.plan.cell_of.items() if self.plan.cells[cell].study == study}

    def _record_done(self, keys: Collection[str]) -> None:
        known: dict[str, LoggedRun] = {}
        for study, parent in self.parents.items():
            known |= self.tracker.ended_trials(study, parent)
        for key in sorted(keys):
            end, run = self.store.done(key), known.get(key)
            ended = (ENDS[end.status], end.adapter_digest) if end else ()
            # a crash ends a run as KILLED too, so that says nothing of what the run has; what was opened here is ended
            # here, also where the answer to a first try was lost
            known_end = (run.status, run.tags.get("adapter_digest")) if run is not None else None
            if key in self._runs or known_end != ended or KILLED in ended:
                self._lacking[key] = partial(self._record, key)

    def _record(self, key: str) -> None:
        """Bring the run of a trial in line with the store."""
        trial = self.store.trial(key)
        end = trial.end()  # before its epochs: a trial that has ended has all of them
        if key in self._ended:
            if end == self._ended[key]:
                return
            del self._ended[key], self._runs[key]  # one that had failed is tried again
        run_id = self._run(key)
        reports = trial.epochs()
        self.tracker.log_metrics(run_id, metric_points(reports, trial.losses(), self._config(key).epochs))
        if end is None:
            return
        trial.check_adapter()
        if end.adapter_digest is not None or trial.adapter.is_dir():
            log_adapter(self.tracker, run_id, trial.adapter)
        if reports:
            self.tracker.log_ledger(run_id, trial.metrics)
        if end.packed is not None:
            self.tracker.tag(run_id, {"packed": end.packed} | ({} if end.exact is None else {"exact": end.exact}))
        if end.status == "stopped":
            self.tracker.tag(run_id, {"stopped_after": end.epochs})
            if end.error:
                self.tracker.tag(run_id, {"left_search": end.error})
        if acts := self.store.acts(key):
            self.tracker.tag(run_id, {"by_hand": "; ".join(act.told for act in acts)})
        self.tracker.close(run_id, ENDS[end.status], None if end.status == "stopped" else end.error)
        self._ended[key] = end

    def _run(self, key: str) -> str:
        if key not in self._runs:
            config, params, origin = self._config(key), self.plan.params, self.store.record(key).provenance
            cell = self.plan.cells[self.plan.cell_of[key]] if key in self.plan.cell_of else None
            study = cell.study if cell else next(iter(self.parents))
            self._runs[key] = self.tracker.open_trial(study, self.parents[study], TrialRunStart(
                key=key, params=parameters(config), inputs=used_by(config, self.plan.places),
                name=run_name(cell, config, with_backbone=self._several) if cell else config.name,
                tags={
                    "profile": params.profile, "trial_config": canonical(config.model_dump(mode="json")),
                    "threads_per_worker": params.sweep.threads_per_worker, "pack": params.sweep.pack,
                },
                description=trial_note(self.plan, config),
                made_by=origin if origin.known and self.store.done(key) else None,
            ))  # fmt: skip
        return self._runs[key]

    def _config(self, key: str) -> TrialConfig:
        return self.plan.trials.get(key) or self.store.config(key)

    def _log_score(self, config: TrialConfig, key: str, run_ids: Iterable[str]) -> None:
        evaluation, file = self.evaluations.read(key), self.evaluations.path(key)
        scores = {evaluation.logged_as(name): value for name, value in evaluation.metrics.items()}
        end = self.store.done(config.key)
        costs = {name: float(value) for name in COSTS if (value := getattr(end, name, None))}
        on, split = config, str(evaluation.evaluation["split"])
        if evaluation.target:
            on = config.model_copy(update=evaluation.target._asdict())
        samples = scored_by(on, self.plan.places, split, evaluation.num_samples)
        for run_id in run_ids:
            self.tracker.log_scores(run_id, {**scores, **costs}, file)
            self.tracker.log_answers(run_id, file, samples, trial_note(self.plan, config))

    def _log_measurement(self, run_id: str, key: str, numbers: Mapping[str, float]) -> None:
        file = self.evaluations.measurement_path(key)
        self.tracker.log_scores(run_id, numbers, file)
        self.tracker.mark_logged(run_id, file)

    def _register(self, trials: Iterable[str]) -> None:
        candidates = []
        for key in trials:
            config, end = self.store.record(key).config, self.store.done(key)
            protocol = digest([config[name] for name in _PROTOCOL])[:16]
            backbone, task, method = (str(config[name]) for name in ("backbone", "task", "method"))
            objective, quantized = end.objective if end else None, config.get("quantize", "none") != "none"
            candidates.append(ModelCandidate(key, backbone, task, method, objective, protocol, quantized))
        try:
            number = ModelRegistry(self.tracker).register(candidates)
        except run_store.AWAY:
            raise
        except HificlError as error:
            say(f"warning: adapters are not registered as models: {error}")
            return
        if number:
            say(f"registered as models: {number} adapters")


def _sweep_key(keys: Iterable[str]) -> str:
    return digest(canonical(sorted(keys)))[:16]


POINTS = 200  # of a trial's losses in MLflow, where each takes 0.2 ms and 260 bytes
STEP_LOSS = "step/train_loss"  # a section of its own among the charts, beside the epochs' means in `train_loss`


def run_name(cell: Cell, config: TrialConfig, *, with_backbone: bool) -> str:
    """Return a trial's name: its row, its task, what varies and what is searched, seed, and the key's beginning.

    Args:
        cell: the cell that asked for the trial first.
        config: the trial.
        with_backbone: whether trials of several backbones stand beside each other.
    """
    parts = name_parts(cell, config)
    del parts["study"]
    if not with_backbone:
        del parts["backbone"]
    return " ".join([*parts.values(), config.key[:6]])


def name_parts(cell: Cell, config: TrialConfig) -> dict[str, str]:
    """Return what a trial is told apart by, kind by kind: its row, its task, ..., what varies and is searched, seed."""
    values = {**config.model_dump(mode="json"), **config.options}
    vary = {name: value for name, value in cell.vary.items() if name != SOURCE_TASK}  # the trial's own task
    points = {**vary, **{name: values[name] for name in cell.search if name in values}}
    named = {"row": cell.row, "task": config.task, "backbone": cell.backbone, "study": cell.study}
    varied = {name: f"{name}={_short(value)}" for name, value in points.items()}
    return {**named, **varied, "seed": f"seed={config.seed}"}


def experiment_note(params: Params, study: str, cells: Iterable[Cell]) -> str:
    """Return what a study's experiment says of itself, in Markdown."""
    definition, cells = params.studies[study], [cell for cell in cells if cell.study == study]
    rows = dict.fromkeys(cell.label for cell in cells)
    tasks = ", ".join(f"`{task}`" for task in dict.fromkeys(cell.task for cell in cells))
    backbones = ", ".join(f"`{backbone}`" for backbone in dict.fromkeys(cell.backbone for cell in cells))
    text = [definition.title, f"{', '.join(rows)}; for {tasks} on {backbones}, profile `{params.profile}`."]
    return "\n\n".join([*text, *filter(None, [definition.notes()])])


def sweep_note(params: Params, study: str, num_trials: int) -> str:
    """Return what a study's parent run says of itself, in Markdown."""
    definition = params.studies[study]
    size = f"{num_trials} trials, profile `{params.profile}`, seeds {', '.join(map(str, definition.seeds))}."
    again = f"`hificl study {study}` runs it again, `hificl trace` leads from a number to its run."
    return f"{definition.title}\n\n{size} {again}"


def trial_note(plan: Plan, config: TrialConfig) -> str:
    """Return what a trial's run says of itself, in Markdown: what was trained on what, and for which study."""
    cell = plan.cells.get(plan.cell_of.get(config.key, ""))  # the one that asked for it first, where one did
    row = cell.label if cell else config.method
    if config.trained:
        step = config.micro_batch_size * config.accumulation * config.world_size
        rate = _short(config.learning_rate)
        samples = f"trained on {config.num_train_samples} samples for {config.epochs} epochs"
        begun = f", the first of them those of trial {config.parent}" if config.parent else ""
        done = f"{samples}{begun}, {step} a step, learning rate {rate}"
    else:
        shots = methods.options(config).shots
        done = f"nothing is trained; {f'{shots} demonstrations' if shots else 'no demonstration'} before each question"
    options = ", ".join(f"{name} {_short(value)}" for name, value in config.options.items())
    study = f"Asked for by *{plan.params.studies[cell.study].title}*, `{cell.study}`." if cell else ""
    more = " ".join(filter(None, [options and f"{options}.", study]))
    return f"{row} on `{config.backbone}` for `{config.task}`, seed {config.seed}: {done}.\n\n{more}".rstrip()


def parameters(config: TrialConfig) -> dict[str, object]:
    """Return the configuration as MLflow params: the method's options beside the other fields, same names."""
    record = config.model_dump(mode="json")
    unsaid = {"options", *(() if config.parent else ("parent",))}
    return {**{name: value for name, value in record.items() if name not in unsaid}, **record["options"]}


def used_by(config: TrialConfig, places: Places) -> list[RunInput]:
    """Return the samples that a trial learns from, or shows, and those that it chooses by."""
    used = []
    if config.trained or methods.options(config).drawn:
        seed = f" {config.seed}" if config.sample_draw == "by-seed" else ""
        drawn = f"{config.num_train_samples} of train, {config.sample_draw}{seed}"
        context = "training" if config.trained else "demonstrations"
        used.append(_run_input(config, places, "train", context, drawn, config.num_train_samples))
    if methods.options(config).selects():
        if config.selection == "test":
            used.append(_run_input(config, places, "evaluation", "selection", "all of evaluation", None))
        else:
            drawn = f"{config.num_selection_samples} of selection, first"
            used.append(_run_input(config, places, "selection", "selection", drawn, config.num_selection_samples))
    return used


def scored_by(config: TrialConfig, places: Places, split: str, number: int) -> RunInput:
    """Return the samples that a trial was scored on."""
    return _run_input(config, places, split, "evaluation", f"{number} of {split}, first", number)


def _run_input(
    config: TrialConfig, places: Places, split: str, context: str, samples: str, rows: int | None
) -> RunInput:
    manifest = os.path.relpath(places.manifest(config.task), places.runs.parent)
    return RunInput(f"{config.task}/{split}", manifest, config.manifest_digest, context, samples, rows)


def metric_points(
    reports: Iterable[EpochReport], losses: Mapping[int, Sequence[float]], epochs: int
) -> list[MetricPoint]:
    """Return what a trial's epochs, and its losses of every step by epoch, are in MLflow."""
    points = [MetricPoint(name, report.epoch, report.metrics[name]) for report in reports for name in report.metrics]
    return [*points, *(MetricPoint(STEP_LOSS, step, loss) for step, loss in curve(losses, epochs))]


def curve(losses: Mapping[int, Sequence[float]], epochs: int) -> list[tuple[int, float]]:
    """Return steps and losses of a trial's curve: of every step, or means of so many that about `POINTS` are left."""
    points = []
    for epoch, values in losses.items():
        together = -(-epochs * len(values) // POINTS)
        for start in range(0, len(values), together):
            some = values[start : start + together]
            points.append(((epoch - 1) * len(values) + start + len(some), sum(some) / len(some)))
    return points


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
