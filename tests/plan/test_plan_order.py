"""Trials of one teacher follow one another in one lane, and no lane is much longer than another."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pipeline import methods
from pipeline.adapters.options import Options
from pipeline.config.load import load
from pipeline.config.trial import TrialConfig
from pipeline.plan.plan import Places, in_lanes, make_plan, pack_key, teacher_key
from pipeline.plan.space import Digests, cells

ROOT = Path(__file__).resolve().parents[2]


class Any_(dict):
    def __missing__(self, key):
        return "0" * 64


def plan_of(*studies: str):
    params = load(ROOT / "params.yaml")
    manifests = {task: f"{number}" * 64 for number, task in enumerate(params.run.tasks)}
    digests = Digests(Any_(), manifests, dict.fromkeys(params.run.tasks, 1000))
    found = [cell for study in studies for cell in cells(params, study, digests)]
    return make_plan(params, found, Places(Path("runs"), Path("manifests"), None))


PLAN = plan_of("miniature-search", "mimic-figure5", "hificl-table2")
KEYS = [key for key, config in PLAN.trials.items() if config.trained]


@given(slots=st.integers(1, 9), number=st.integers(1, len(KEYS)))
def test_each_trial_once_and_a_teacher_in_one_lane(slots, number):
    keys = KEYS[:number]
    ordered = in_lanes(PLAN, keys, slots)
    assert sorted(ordered) == sorted(keys)
    groups = {}
    for key in keys:
        groups.setdefault(teacher_key(PLAN.trials[key]) or key, []).append(key)
    for group in groups.values():
        places = sorted(ordered.index(key) for key in group)
        apart = {b - a for a, b in zip(places, places[1:], strict=False)}
        assert not apart or max(apart) <= slots


def test_trials_without_a_teacher_share_none_and_other_demonstrations_are_another():
    of = {key: teacher_key(config) for key, config in PLAN.trials.items()}
    assert all(of[key] is None for key in KEYS if PLAN.trials[key].method in ("lora",))
    search = [key for key in KEYS if PLAN.trials[key].method in ("mimic", "live") and PLAN.trials[key].num_shots == 8]
    assert len({of[key] for key in search}) == len({PLAN.trials[key].task for key in search})
    request = PLAN.request_of(PLAN.trials[search[0]])
    assert set(request.kinds) >= {("hidden", "mlp"), ("logits", "")}


def test_a_trials_options_are_checked_once(monkeypatch):
    calls, planned, parse, checked = [], [], methods.parse, Options.checked.__func__
    monkeypatch.setattr(methods, "_checked", {})
    monkeypatch.setattr(methods, "parse", lambda method, given: planned.append(method) or parse(method, given))
    counted = classmethod(lambda kind, given, method: calls.append(method) or checked(kind, given, method))
    monkeypatch.setattr(Options, "checked", counted)
    plan = plan_of("miniature-search")
    for config in plan.trials.values():
        assert methods.options(config).plain() == config.options
        assert teacher_key(config) is None or methods.facts(config).kind
    assert calls == planned and set(calls) == {config.method for config in plan.trials.values()}


def test_lora_of_a_vision_tower_packs_where_the_tower_sees_a_row_a_picture(tmp_path):
    def packs(backbone, scope="all"):
        options = methods.parse("lora", {"scope": scope}).plain()
        given = {"backbone": backbone, "backbone_digest": "", "task": "mini-vqa", "manifest_digest": "", "epochs": 1}
        return pack_key(TrialConfig(method="lora", options=options, engine="torch", **given)) is not None

    kinds = {"text": "qwen2", "pictures": "gemma3"}  # in folders, whose files say what they read
    for name, kind in kinds.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
    names = ("mini-idefics2", "idefics2-8b-base", "idefics-9b", "llava-interleave-7b", "llava-onevision-qwen2-7b")
    assert all(packs(name) for name in (*names, f"folder:{tmp_path / 'text'}"))
    alone = ("llava-v1.6-mistral-7b", "qwen3-vl-8b", f"folder:{tmp_path / 'pictures'}", "hub:no/such")
    assert not any(packs(name) for name in alone)
    assert all(packs(name, "decoder") for name in (*names, *alone))
