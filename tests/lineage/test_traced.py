"""What `hificl trace` prints of a seed's way: the stations that there are, and no others."""

from dataclasses import asdict, replace

from pipeline.lineage.traced import (
    Chain,
    MadeFrom,
    NamedManifest,
    NamedRun,
    TracedAdapter,
    TracedBackbone,
    TracedCode,
    TracedManifest,
    TracedRun,
)

RUN = TracedRun("r1", "hificl", None, "FINISHED", None, "d1", "sqlite:///mlflow.db")
ORIGIN = MadeFrom(
    config={"epochs": 1},
    adapter=TracedAdapter("runs/k/adapter", "d" * 64, 2),
    data=TracedManifest("data/manifests/coco/manifest.json", "m" * 64, 0, "data/real", {"a.json": "0"}, 1200),
    backbone=TracedBackbone("mini-idefics2", "b" * 64),
    code=TracedCode("c" * 40, True, ["params.yaml"], 3, [None], {"torch": "2"}),
)
CHAIN = Chain(0, 61.5, RUN, "k", "evaluations/e.json", None, ORIGIN)


def test_a_whole_way_has_every_station():
    record = CHAIN.record()
    assert list(record)[:6] == ["seed", "value", "run", "trial", "evaluation", "scored_by"]
    assert list(record)[6:] == ["config", "adapter", "data", "backbone", "code"]
    assert record["run"] == asdict(RUN) and list(asdict(RUN))[:2] == ["run_id", "name"]
    shown = dict(CHAIN.stations())
    assert shown["run"] == "r1 hificl FINISHED" and shown["adapter"].endswith("epoch 2")
    assert shown["data"].endswith("1 files and 1,200 images below data/real")
    assert shown["commit"] == f"{'c' * 40}, with changes in params.yaml"


def test_what_is_not_there_is_left_out():
    untrained = replace(CHAIN, origin=replace(ORIGIN, adapter=None)).record()
    assert "adapter" not in untrained and untrained["code"]["changed"] == ["params.yaml"]
    unknown = replace(CHAIN, run=None, origin=None)
    assert unknown.record()["run"] == {} and list(unknown.record())[-1] == "scored_by"
    assert [name for name, _ in unknown.stations()] == ["evaluation", "trial"]
    assert replace(CHAIN, run=NamedRun("r2")).record()["run"] == {"run_id": "r2"}
    unread = replace(CHAIN, origin=replace(ORIGIN, data=NamedManifest("manifest.json", None)))
    assert unread.record()["data"] == {"manifest": "manifest.json", "digest": None}
    assert "data" not in dict(unread.stations())
