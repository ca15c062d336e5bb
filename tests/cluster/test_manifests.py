"""The files of cluster/ are what Ray and KubeRay read. Nothing is started here."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

CLUSTER = ROOT / "cluster"
TYPES: dict[str, Any] = {
    "string": str,
    "integer": int,
    "boolean": bool,
    "object": dict,
    "array": list,
    "quantity": str | int,
}


def manifests() -> dict[str, dict]:
    return {one["kind"]: one for one in yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text())}


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every field of a manifest by its path; the names inside a map of strings are `*`."""
    yield path, value
    if isinstance(value, dict):
        for name, inside in value.items():
            free = path.endswith(("rayStartParams", "clusterSelector", "requests", "limits"))
            yield from walk(inside, f"{path}.{'*' if free else name}".lstrip("."))
    elif isinstance(value, list):
        for inside in value:
            yield from walk(inside, f"{path}[]")


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_kuberay_knows_every_field(kind):
    """By a table of the fields in use; the whole schema is checked where it is at hand (below)."""
    table = yaml.safe_load((Path(__file__).parent / "kuberay_fields.yaml").read_text())[kind]
    spec = manifests()[kind]["spec"]
    found = dict(walk(spec))
    unknown = [path for path in found if path and path not in table["fields"]]
    assert not unknown, f"KubeRay {kind} has no such field: {unknown}"
    for path, value in found.items():
        expected = table["fields"].get(path, "object")
        assert isinstance(value, TYPES[expected]), f"{path} must be {expected}, is {value!r}"
    for path, names in table["required"].items():
        for where, value in walk(spec):
            if where == path:
                assert set(names) <= value.keys(), f"{path or 'spec'} lacks one of {names}"


def test_a_misspelt_field_is_found():
    table = yaml.safe_load((Path(__file__).parent / "kuberay_fields.yaml").read_text())["RayCluster"]["fields"]
    paths = {path for path, _ in walk({"headGroupSpecs": {}, "authOptions": {"mod": "token"}})}
    assert {path for path in paths if path and path not in table} == {"headGroupSpecs", "authOptions.mod"}


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_kuberay_knows_every_field_by_its_whole_schema(kind):
    """The CRDs of github.com/ray-project/kuberay (Apache-2.0), ray-operator/config/crd/bases, in HIFICL_KUBERAY_CRD."""
    folder = Path(os.environ.get("HIFICL_KUBERAY_CRD", ROOT / "../shared/data/kuberay"))
    file = folder / f"ray.io_{kind.lower()}s.yaml"
    if not file.is_file():
        pytest.skip("KubeRay's CRDs are not at hand (HIFICL_KUBERAY_CRD)")
    crd = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(one for one in crd["spec"]["versions"] if one["name"] == "v1")
    problems = list(check(manifests()[kind], version["schema"]["openAPIV3Schema"], kind))
    assert not problems, problems


def check(value: Any, schema: dict, path: str) -> Iterator[str]:
    """Yield what is wrong with a value by a structural schema of Kubernetes, which drops fields it does not know."""
    if schema.get("x-kubernetes-int-or-string"):
        if not isinstance(value, int | str):
            yield f"{path}: {value!r} is neither a number nor a string"
        return
    kind = schema.get("type")
    if kind in TYPES and not isinstance(value, TYPES[kind]):
        yield f"{path}: {value!r} is no {kind}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r} is none of {schema['enum']}"
    if kind == "object":
        known, rest = schema.get("properties", {}), schema.get("additionalProperties")
        yield from (f"{path}: lacks {name}" for name in schema.get("required", []) if name not in value)
        for name, inside in value.items():
            if name in known or rest:
                yield from check(inside, known.get(name, rest), f"{path}.{name}")
            elif known and not schema.get("x-kubernetes-preserve-unknown-fields"):
                yield f"{path}: knows no {name}"
    elif kind == "array":
        for number, inside in enumerate(value):
            yield from check(inside, schema["items"], f"{path}[{number}]")


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster-aws.yaml"])
def test_ray_accepts_the_cluster_files(name):
    from ray.autoscaler._private.util import fillout_defaults, prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / name).read_text())
    filled = prepare_config(config) if config["provider"]["type"] == "local" else fillout_defaults(config)
    validate_config({"cluster_synced_files": [], **filled})
    assert "0.0.0.0" not in (CLUSTER / name).read_text()
    starts = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    spot = config["provider"]["type"] == "aws"
    assert ("hificl notice" in starts) is spot
    assert starts.count("RAY_AUTH_MODE=token") == 2 + spot and "--dashboard-host=127.0.0.1" in starts
    assert all("#" not in line for key in config if key.endswith("commands") for line in config[key])


def test_no_file_of_cluster_holds_a_secret():
    token = Path.home() / ".ray/auth_token"
    texts = {file.name: file.read_text() for file in CLUSTER.iterdir() if file.is_file()}
    assert {"cluster.yaml", "cluster-aws.yaml", "kuberay.yaml", "sweep", "README.md"} <= texts.keys()
    if token.is_file():
        assert not any(token.read_text().strip() in text for text in texts.values())
    pods = manifests()["RayCluster"]["spec"]
    for name in ("MLFLOW_TRACKING_PASSWORD",):
        (entry,) = [e for e in pods["headGroupSpec"]["template"]["spec"]["containers"][0]["env"] if e["name"] == name]
        assert "value" not in entry and entry["valueFrom"]["secretKeyRef"]
    assert stat.S_IMODE((CLUSTER / "sweep").stat().st_mode) & 0o111


def test_rays_metrics_exporters_are_off_in_every_file():
    """They ask nobody for a token."""
    cluster = manifests()["RayCluster"]["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "RAY_enable_metrics_collection", "value": "0"} in container["env"]
    for name in ("cluster.yaml", "cluster-aws.yaml"):
        started = yaml.safe_load((ROOT / "cluster" / name).read_text())
        for part in ("head_start_ray_commands", "worker_start_ray_commands"):
            assert "RAY_enable_metrics_collection=0" in " ".join(started[part])
