"""A tracking server in memory, and MLflow's client of it: answers, is away, or loses an answer on its way back."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from tests.simulation.world import World

ADDRESS = "http://tracking.simulated"
_TERM = re.compile(r"(\w+)\.`?([\w.]+)`? (!?=) '([^']*)'")


class Page(list):
    token = None


class Server:
    """The runs, whoever asks."""

    def __init__(self, world: World) -> None:
        self.world, self.away = world, False
        self.loses = 0.0  # the share of answers that are lost on their way
        self.experiments: dict[str, SimpleNamespace] = {}
        self.runs: dict[str, SimpleNamespace] = {}
        self.points: dict[str, list[SimpleNamespace]] = {}
        self.models: dict[str, SimpleNamespace] = {}
        self.number = 0

    def next(self, kind: str) -> str:
        self.number += 1
        return f"{kind}{self.number:06d}"

    def probe(self) -> None:
        self.world.sleep(0.01)
        if self.away or self.world.process.host.cut_off:
            raise OSError("connection refused")

    def ask(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        world = self.world
        world.sleep(world.rng.expovariate(200))
        if self.away or world.process.host.cut_off:
            world.sleep(world.rng.uniform(0.1, 15))  # the client's own tries and time-out
            raise MlflowException("API request failed: connection refused", TEMPORARILY_UNAVAILABLE)
        answer = getattr(self, name)(*arguments, **named)
        if name in ("create_run", "update_run", "set_terminated"):
            world.say(f"MLflow: {name} {arguments} {named.get('run_name', '')} {named.get('status', '')}")
        world.sleep(world.rng.expovariate(200))
        if world.rng.random() < self.loses:
            world.say(f"MLflow: the answer to {name} is lost")
            raise MlflowException("API request failed: connection reset", TEMPORARILY_UNAVAILABLE)
        return answer

    # -- experiments -----------------------------------------------------------------------------------------------

    def search_experiments(self, page_token: Any = None, max_results: int = 0) -> Page:
        return Page(self.experiments.values())

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        return next((entry for entry in self.experiments.values() if entry.name == name), None)

    def get_experiment(self, number: str) -> SimpleNamespace:
        return self.experiments[number]

    def create_experiment(self, name: str, artifact_location: str | None = None) -> str:
        if self.get_experiment_by_name(name) is not None:
            raise MlflowException(f"Experiment '{name}' already exists.")
        number = self.next("e")
        self.experiments[number] = SimpleNamespace(experiment_id=number, name=name, tags={}, lifecycle_stage="active")
        return number

    def set_experiment_tag(self, number: str, key: str, value: str) -> None:
        self.experiments[number].tags[key] = value

    # -- runs ------------------------------------------------------------------------------------------------------

    def search_runs(self, experiments: list[str], query: str, view: Any, page_token: Any = None) -> Page:
        terms = _TERM.findall(query)
        assert len(terms) == len(query.split(" and ")), query
        return Page(
            self.get_run(number) for number, run in self.runs.items()
            if run.info.experiment_id in experiments and all(self._holds(run, *term) for term in terms)
        )  # fmt: skip

    @staticmethod
    def _holds(run: SimpleNamespace, kind: str, name: str, sign: str, value: str) -> bool:
        present = getattr(run.info, name) if kind == "attributes" else run.data.tags.get(name)
        return (present == value) == (sign == "=") and present is not None

    def get_run(self, number: str) -> SimpleNamespace:
        run = self.runs[number]
        last = {point.key: point for point in sorted(self.points[number], key=lambda point: point.step)}
        data = SimpleNamespace(
            params=dict(run.data.params), tags=dict(run.data.tags),
            metrics={name: point.value for name, point in last.items()}, _metric_objs=list(last.values()),
        )  # fmt: skip
        return SimpleNamespace(info=SimpleNamespace(**vars(run.info)), data=data, inputs=run.inputs)

    def create_run(self, experiment: str, tags: dict[str, str], run_name: str) -> SimpleNamespace:
        number = self.next("r")
        info = SimpleNamespace(
            run_id=number, experiment_id=experiment, run_name=run_name, status="RUNNING",
            start_time=int(self.world.now * 1000), end_time=None,
        )  # fmt: skip
        self.runs[number] = SimpleNamespace(
            info=info, data=SimpleNamespace(params={}, tags=dict(tags)),
            inputs=SimpleNamespace(dataset_inputs=[]), files={},
        )  # fmt: skip
        self.points[number] = []
        return self.runs[number]

    def log_batch(self, number: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        run = self.runs[number]
        for param in params:
            if run.data.params.setdefault(param.key, param.value) != param.value:
                raise MlflowException(f"Changing param values is not allowed: {param.key}")
        run.data.tags.update({tag.key: tag.value for tag in tags})
        self.points[number].extend(metrics)

    def update_run(self, number: str, status: str, name: str) -> None:
        self.runs[number].info.status, self.runs[number].info.run_name = status, name

    def set_tag(self, number: str, key: str, value: str) -> None:
        self.runs[number].data.tags[key] = value

    def set_terminated(self, number: str, status: str, end_time: int | None = None) -> None:
        info = self.runs[number].info
        info.status, info.end_time = status, end_time or int(self.world.now * 1000)

    def log_inputs(self, number: str, inputs: list[Any]) -> None:
        self.runs[number].inputs.dataset_inputs.extend(inputs)

    def get_metric_history(self, number: str, name: str) -> list[Any]:
        return [point for point in self.points[number] if point.key == name]

    # -- files -----------------------------------------------------------------------------------------------------

    def log_artifact(self, number: str, file: str, folder: str = "") -> None:
        with open(file, "rb") as handle:
            self.runs[number].files[f"{folder}/{file.rpartition('/')[2]}"] = handle.read()

    def log_artifacts(self, number: str, folder: str) -> None: ...

    def log_dict(self, number: str, content: Any, name: str) -> None: ...

    def search_logged_models(self, experiments: list[str], filter_string: str) -> list[SimpleNamespace]:
        source = filter_string.partition("'")[2].rstrip("'")
        return [model for model in self.models.values() if model.source == source]

    def create_logged_model(
        self, experiment: str, name: str, source_run_id: str, model_type: str, tags: dict[str, str]
    ) -> SimpleNamespace:
        number = self.next("m")
        self.models[number] = SimpleNamespace(model_id=number, source=source_run_id, tags=tags, files={}, ready=False)
        return self.models[number]

    def log_model_artifacts(self, number: str, folder: str) -> None:
        for file in sorted(Path(folder).iterdir()):
            self.models[number].files[file.name] = file.read_bytes()

    def finalize_logged_model(self, number: str, status: str) -> None:
        self.models[number].ready = status == "READY"

    def log_outputs(self, number: str, models: Any) -> None: ...


class Client:
    """Stands in the place of MlflowClient."""

    server: Server

    def __init__(self, uri: str) -> None:
        assert uri == ADDRESS

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Server, name):
            raise AttributeError(name)
        return lambda *args, **named: Client.server.ask(name, args, named)
