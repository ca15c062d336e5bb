"""What the papers' studies train with under `real`: every trial beside pipeline/config/papers/settings.yaml."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from pipeline.config import papers
from pipeline.config.load import load
from pipeline.core.errors import InputError
from pipeline.plan import plan as trials
from pipeline.plan.plan import Places, as_given, make_plan, places
from pipeline.plan.space import cells, needed, points, tried
from pipeline.plan.unheard import unheard
from tests.conftest import ROOT

TABLE_6 = {  # written down a second time, by hand
    "llava-interleave-7b": {"vqav2": 8, "okvqa": 4, "coco": 8},
    "idefics2-8b-base": {"vqav2": 8, "okvqa": 16, "coco": 4},
}  # fmt: skip


def trial_rows(params, studies):
    return trials.trial_rows(params, studies, places(ROOT / "tests"), lambda key: False)  # no samples are drawn there


@pytest.fixture(scope="module")
def rows():
    params = load(ROOT / "params.yaml", ["subsample.num_train=8000"], profile="real")
    printed = [name for name, study in params.studies.items() if study.paper]
    return {name: trial_rows(params, [name]) for name in printed}, params


def all_of(rows, paper):
    return [
        (name, row) for name, found in rows[0].items() if name.startswith(paper) for row in found if row.trial.epochs
    ]


def test_every_study_of_the_papers_can_be_laid_out_under_real(rows):
    assert len(rows[0]) >= 21 and all(rows[0].values())


def test_each_trial_has_what_its_paper_gives_unless_the_study_asks_otherwise(rows):
    by_hand, params = Counter(), rows[1]
    for name, row in [*all_of(rows, "hificl"), *all_of(rows, "mimic")]:
        wanted = {}
        for rule in papers.rules(
            params.studies[name].paper, name, row.trial.method, row.trial.backbone, row.trial.task
        ):
            wanted.update(rule.set)
        own = {**row.trial.options, **row.record()}
        below = row.trial.num_train_samples < 1000
        for field, value in wanted.items():
            if field == ("epochs" if below else "epochs_below_1000") or (field == "num_shots" and not row.num_shots):
                continue
            shown = "epochs" if field == "epochs_below_1000" else field
            if row.sources[shown].startswith("study"):  # what the row fixes, or the study varies
                by_hand[shown] += 1
                continue
            got = own[shown]
            assert (value.items() <= got.items()) if isinstance(value, dict) else got == value, (name, row.row, shown)
    assert set(by_hand) <= {"rank", "num_train_samples", "num_shots"}, by_hand


def test_the_studies_have_the_numbers_that_the_papers_print(rows):
    hificl = all_of(rows, "hificl")
    for name, row in hificl:
        assert (row.trial.weight_decay, row.trial.precision, row.trial.warmup_ratio) == (0.05, "fp16", 0.1), (
            name,
            row.row,
        )
        assert (row.trial.micro_batch_size, row.trial.accumulation) == (2, 2)
        assert row.trial.epochs == (5 if row.trial.num_train_samples >= 1000 else 10), (name, row.row)
        assert row.trial.learning_rate == (5e-4 if row.trial.method == "lora" else 5e-3), (name, row.row)
        if row.trial.method == "hificl":
            assert row.trial.options["num_virtual_tokens"] == 8
            if "rank" not in row.vary and name != "hificl-table8":
                assert row.trial.options["rank"] == TABLE_6.get(row.trial.backbone, {}).get(row.trial.task, 8), (
                    name,
                    row,
                )
        if row.trial.method == "mimic":
            assert row.trial.options["shift"] == (
                "linear" if row.trial.backbone == "llava-interleave-7b" else "vector"
            ), name
            assert row.num_shots == (32 if row.trial.backbone == "idefics-9b" else 8)
    for name, row in all_of(rows, "mimic"):
        assert (row.trial.weight_decay, row.trial.precision) == (1e-3, "fp16"), (name, row.row)
        assert row.trial.learning_rate == (5e-4 if row.trial.method in ("lora", "lora-mini") else 5e-3), (name, row.row)
        full = {"live": 10, "mimic+lora": 1}.get(row.trial.method, 5)
        below = {"mimic+lora": 1}.get(row.trial.method, 10)
        assert row.trial.epochs == (full if row.trial.num_train_samples >= 1000 else below), (name, row.row)
        if row.num_shots and "num_shots" not in row.vary and name != "mimic-table10":
            assert row.num_shots == (32 if row.trial.backbone == "idefics-9b" else 8), (name, row.row)
    assert {row.trial.num_train_samples for row in rows[0]["mimic-table9"]} == {8000}
    assert {row.trial.alignment_weight for row in rows[0]["mimic-table9"] if row.trial.method == "mimic"} == {0.7}
    (combined,) = {
        row.trial.options["lora"]["rank"] for row in rows[0]["mimic-table12"] if row.trial.method == "mimic+lora"
    }
    assert combined == 16


def test_the_rows_of_the_papers_are_there(rows):
    made = {name: {row.row for row in found} for name, found in rows[0].items()}
    assert {"live", "mimic"} <= made["hificl-figure6"]
    assert {row.trial.backbone for row in rows[0]["hificl-table6"]} == {"llava-interleave-7b", "idefics2-8b-base"}
    assert {row.vary["num_train_samples"] for row in rows[0]["mimic-figure7"]} == {100, 300, 500, 700, 1000}


def test_evaluation_sizes_are_the_tasks_own(rows):
    sizes = {row.trial.task: row.num_evaluation for found in rows[0].values() for row in found}
    assert sizes["vqav2"] == 10_000 and sizes["okvqa"] == 5_046 and sizes["coco"] == 40_504


def test_the_published_protocol_has_its_scripts_epochs_and_weight_decay():
    params = load(ROOT / "params.yaml", ["protocol=published"], profile="real")
    trained = [row for row in trial_rows(params, ["hificl-table1"]) if row.trial.epochs]
    assert {(row.trial.epochs, row.trial.weight_decay) for row in trained} == {(3, 0.001)}
    (combined,) = {
        row.trial.options["lora"]["rank"]
        for row in trial_rows(params, ["mimic-table12"])
        if row.trial.method == "mimic+lora"
    }
    assert combined == 1


def test_only_what_the_studies_need_is_drawn_and_loaded():
    params = load(ROOT / "params.yaml", profile="real")
    assert needed(params, ["hificl-table1"]) == (
        ["idefics2-8b-base", "llava-interleave-7b"],
        ["vqav2", "okvqa", "coco"],
    )
    assert needed(params, ["mimic-table11"]) == (["idefics-9b"], ["vqav2", "okvqa"])


# -- what the user sets ------------------------------------------------------------------------------------------------


def settings_of(study: str, *overrides: str, profile: str = "mini"):
    params = load(ROOT / "params.yaml", list(overrides), profile=profile)
    return params, trial_rows(params, [study])


def test_what_the_user_sets_wins_over_profile_paper_and_method():
    params, rows = settings_of("hificl-table1", "train.learning_rate=0.001")
    trained = [row for row in rows if row.trial.epochs]
    assert {row.trial.learning_rate for row in trained} == {0.001} and len({row.trial.method for row in trained}) == 4
    assert {row.sources["learning_rate"] for row in trained} == {"params.yaml"}
    assert unheard(params, cells(params, "hificl-table1", as_given(params))) == []


def test_epochs_are_epochs_for_any_number_of_samples():
    _, rows = settings_of("hificl-figure4", "train.epochs=3")
    assert {row.trial.epochs for row in rows if row.trial.method != "icl-k"} == {3}
    _, rows = settings_of("hificl-figure4", "train.epochs=3", "train.epochs_below_1000=4")
    assert {(row.trial.num_train_samples >= 1000, row.trial.epochs) for row in rows if row.trial.epochs} == {
        (True, 3),
        (False, 4),
    }
    _, rows = settings_of("hificl-figure4", "train.epochs_below_1000=4", "methods.hificl.epochs=3")
    assert {row.trial.epochs for row in rows if row.trial.method == "hificl"} == {3}


def test_of_a_combined_methods_part_only_what_is_set_changes():
    for protocol, rank in (("", 16), ("published", 1)):
        _, rows = settings_of(
            "mimic-table12", f"protocol={protocol}", "methods.mimic+lora.lora.dropout=0.1", profile="real"
        )
        parts = [row.trial.options["lora"] for row in rows if row.trial.method == "mimic+lora"]
        assert {(part["rank"], part["dropout"]) for part in parts} == {(rank, 0.1)}


@pytest.mark.parametrize("layer", ["methods", "profiles.mini.methods"])
@pytest.mark.parametrize(
    ("setting", "says"),
    [("hifcl.rank=4", "unknown method 'hifcl'.*Did you mean 'hificl'"), ("mimic+lora.rnk=4", "unknown field 'rnk'")],
)
def test_a_misspelt_method_or_option_is_refused_though_no_study_here_asks_for_it(layer, setting, says):
    with pytest.raises(InputError, match=says):
        settings_of("hificl-table8", f"{layer}.{setting}")


@pytest.mark.parametrize(
    ("study", "override", "says"),
    [
        ("hificl-figure4", "train.num_train_samples=500", "study hificl-figure4, vary sets num_train_samples"),
        ("hificl-table1", "methods.lora.rank=4", "row lora-r16 sets rank"),
        ("miniature-search", "train.learning_rate=0.1", "search of row hificl sets learning_rate"),
        ("hificl-table1", "methods.lora-mini.rank=4", "changes nothing here"),
        ("hificl-table1", "methods.hificl.point=residual", "changes nothing here"),
        ("hificl-table8", "train.num_shots=4", "changes nothing here"),
        ("hificl-table8", "train.epochs_below_1000=4", "changes nothing here"),
        ("hificl-table8", "train.sample_draw=by-seed", "changes nothing here"),
        ("hificl-table8", "sweep.search=random", "changes nothing here: no row of these studies is searched"),
        ("hificl-table8", "sweep.scheduler=asha", "changes nothing here: no row of these studies is searched"),
        ("miniature-search", "sweep.num_samples=4", "changes nothing here: sweep.search is grid"),
        ("miniature-search", "sweep.seed=4", "changes nothing here: sweep.search is grid"),
        ("miniature-search", "sweep.grace_epochs=2", "changes nothing here: sweep.scheduler is fifo"),
        ("miniature-search", "sweep.reduction_factor=2", "sweep.scheduler is fifo, it is for asha"),
        ("miniature-search", "sweep.warm_start=2", "sweep.search is grid, it is for optuna"),
        ("miniature-search", "sweep.early_exit={keep: 0.3}", "sweep.early_exit.after names no point"),
        ("hificl-table8", "sweep.early_exit={after: [0.5]}", "no row of these studies is searched"),
        ("hificl-table8", "subsample.tasks.mme={num_train: 8}", "none of these studies asks for mme"),
        ("hificl-table8", "subsample.splits.coco=karpathy", "none of these studies asks for coco"),
        (
            "hificl-table8",
            "subsample.num_train=1500",
            "1500 samples.*, 1000 are used, by train.num_train_samples: mini-vqa",
        ),
        (
            "hificl-table8",
            "subsample.num_selection=301",
            "301.*, 200 are used, by train.num_selection_samples: mini-vqa",
        ),
        (
            "hificl-table8",
            "evaluate.num_evaluation_samples=9999",
            "2000 are drawn and all scored: mini-vqa, mini-okvqa",
        ),
        ("hificl-table8", "evaluate.stem_predictions=true", "changes nothing here"),
        ("hificl-table8", "evaluate.drop_incomplete_batch=8", "changes nothing here: no row shows demonstrations"),
        ("hificl-table8", "evaluate.generation.length_penalty=0.5", "changes nothing here: it is for beams"),
    ],
)
def test_a_setting_that_does_not_reach_its_trials_is_named_with_the_one_that_wins(study, override, says):
    params, _ = settings_of(study, override)
    lines = unheard(params, cells(params, study, as_given(params)))
    assert len(lines) == len(set(lines)) <= 4
    assert any(re.search(says, line) and override.partition("=")[0] in line for line in lines), lines


@pytest.mark.parametrize(
    "overrides",
    [
        ["sweep.search=optuna", "sweep.num_samples=4", "sweep.seed=4", "sweep.warm_start=2"],
        ["sweep.search=optuna", "sweep.num_samples=4", "sweep.scheduler=asha", "sweep.grace_epochs=2"],
        ["sweep.early_exit={after: [0.5, 1], keep: 0.3, group: 4}"],
        ["sweep.pack=4", "sweep.scheduler=median", "sweep.grace_epochs=2", "evaluate.num_evaluation_samples=100"],
        ["subsample.num_train=1500", "train.num_train_samples=1500", "subsample.num_selection=200"],
        [
            "evaluate.generation.num_beams=3",
            "evaluate.generation.length_penalty=0.5",
            "evaluate.vqa_normalise=official",
        ],
    ],
)
def test_settings_that_decide_something_are_no_cause_for_a_line(overrides):
    params, _ = settings_of("miniature-search", *overrides)
    assert unheard(params, cells(params, "miniature-search", as_given(params))) == []


def test_a_profile_by_itself_asks_for_nothing_that_is_not_heard():
    for profile in (path.stem for path in (ROOT / "profiles").glob("*.yaml")):
        params = load(ROOT / "params.yaml", profile=profile)
        for study in params.run.studies:
            assert unheard(params, cells(params, study, as_given(params))) == [], (profile, study)


def test_what_only_other_tasks_and_engines_know_is_named():
    choices = "studies.own={title: o, backbones: [idefics-9b], tasks: [mme, flickr30k], methods: {lora: {}}}"
    wanted = {
        "evaluate.vqa_normalise=official": "no task has VQA accuracy",
        "sweep.pack=4": "no two trials of these studies can share a pass",
        "subsample.num_selection=50": "does not reach mme: profile real sets subsample.tasks.mme.num_selection=",
    }
    sharded = ["train.engine=deepspeed", "train.zero_stage=3"]
    params = load(ROOT / "params.yaml", [choices, *sharded, *wanted], profile="real")
    lines = unheard(params, cells(params, "own", as_given(params)))
    assert len(lines) == 3 and all(any(says in line for line in lines) for says in wanted.values()), lines
    both = [*wanted, "subsample.tasks.mme.num_selection=50"]
    params = load(ROOT / "params.yaml", [choices, *sharded, *both], profile="real")
    assert len(unheard(params, cells(params, "own", as_given(params)))) == 2
    params = load(ROOT / "params.yaml", [choices, "train.zero_stage=3"], profile="real")
    (line,) = unheard(params, cells(params, "own", as_given(params)))
    assert line.startswith("train.zero_stage=3 changes nothing here: every trial has one rank")
    alone = [choices.replace(", flickr30k", ""), "subsample.training_answer=first"]
    params = load(ROOT / "params.yaml", alone, profile="real")
    (line,) = unheard(params, cells(params, "own", as_given(params)))
    assert "subsample.training_answer=first changes nothing here" in line


def test_of_two_numbers_of_epochs_the_one_that_decides_is_named():
    few = "studies.own={title: o, backbones: [idefics2-8b-base], tasks: [vqav2], train: {num_train_samples: NUMBER}, "
    few += "methods: {hificl: {epochs_below_1000: 20}, mimic: {}}}"

    def lines(number, *overrides):
        params = load(ROOT / "params.yaml", [few.replace("NUMBER", str(number)), *overrides])
        return unheard(params, cells(params, "own", as_given(params)))

    (line,) = lines(500, "train.epochs=3")
    assert line.startswith("train.epochs=3 does not reach 1 of 2 cells: study own, row hificl sets epochs_below_1000")
    assert lines(1000, "train.epochs=3") == []
    (line,) = lines(500, "train.epochs=3", "methods.hificl.epochs=4")[1:]
    assert line.startswith("methods.hificl.epochs=4 does not reach 1 of 1 cells")
    first, second = lines(500, "train.epochs=3", "train.epochs_below_1000=7")
    assert first.startswith("train.epochs=3 changes nothing here") and "train.epochs_below_1000=7 does not" in second


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("subsample.tasks.mem={num_train: 3}", "unknown task 'mem'.*Did you mean 'mme'"),
        ("subsample.splits.mem=official", "unknown task 'mem'.*Did you mean 'mme'"),
        ("backbones.idefics2-8b={weights: here}", "unknown backbone 'idefics2-8b'.*idefics2-8b-base"),
    ],
)
def test_a_misspelt_task_or_backbone_is_refused(setting, says):
    with pytest.raises(InputError, match=says):
        settings_of("hificl-table8", setting)


@pytest.mark.parametrize("setting", ["num_selection_samples=10", "selection=test"])
@pytest.mark.parametrize("method", ["function-vector", "task-vector"])
def test_a_method_without_training_that_chooses_a_layer_hears_where_it_chooses(method, setting):
    study = f"studies.own={{title: o, backbones: [idefics2-8b-base], tasks: [vqav2], methods: {{{method}: {{}}}}}}"
    params = load(ROOT / "params.yaml", [study, f"train.{setting}"])
    assert unheard(params, cells(params, "own", as_given(params))) == []
    params = load(ROOT / "params.yaml", [study.replace("{}", "{layer: 1}"), f"train.{setting}"])
    assert "changes nothing" in unheard(params, cells(params, "own", as_given(params)))[0]


# -- what cannot be ----------------------------------------------------------------------------------------------------


OWN = "studies.own={title: o, backbones: [idefics2-8b-base], tasks: [vqav2], methods: {hificl: {search: SPACE}}}"


def plan(study: str, *overrides: str, profile: str = "real-check"):
    params = load(ROOT / "params.yaml", list(overrides), profile=profile)
    return make_plan(params, cells(params, study, as_given(params)), Places(ROOT / "runs", ROOT / "data", None))


def test_the_profiles_give_what_their_studies_ask_for():
    for profile in (path.stem for path in (ROOT / "profiles").glob("*.yaml")):
        for study in load(ROOT / "params.yaml", profile=profile).run.studies:
            assert plan(study, profile=profile).trials


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["profiles.real-check.study_changes={}"], r"16 demonstrations are asked for.*pool.*8 samples \(and 5 more: "),
        (["train.num_shots=8"], "8 demonstrations are asked for.*pool of vqav2 has 8"),
        (["train.num_train_samples=13"], "13 training samples are asked for, vqav2 has 12"),
        (["train.num_selection_samples=5"], "5 selection samples are asked for, vqav2 has 4.*subsample.num_selection"),
        (["studies.hificl-table1.vary={num_selection_samples: [2, 5]}"], "5 selection samples are asked for"),
    ],
)
def test_what_a_pool_cannot_give_is_said_before_anything_trains(overrides, says):
    with pytest.raises(InputError, match=says):
        plan("hificl-table1", *overrides)


@pytest.mark.parametrize("search", ["grid", "random", "optuna"])
@pytest.mark.parametrize(
    ("space", "says"),
    [
        ("{num_train_samples: [20, 5000]}", "5000 training samples are asked for, mini-vqa has 1000"),
        ("{rank: [1, 0]}", "rank.*greater than or equal to 1, got 0"),
        ("{rank: [2, two]}", "rank.*got 'two'"),
    ],
)
def test_a_point_that_cannot_be_is_named_whatever_the_search(search, space, says):
    own = OWN.replace("SPACE", space)
    with pytest.raises(InputError, match=says):
        plan("own", own, f"sweep.search={search}", "sweep.num_samples=20", profile="mini")


@pytest.mark.parametrize("space", ["{num_train_samples: {randint: [20, 5000]}}", "{rank: {uniform: [1, 9]}}"])
def test_a_range_with_points_that_cannot_be_is_named(space):
    own = OWN.replace("SPACE", space)
    with pytest.raises(InputError, match="own/mini-idefics2/mini-vqa/hificl|method 'hificl'"):
        plan("own", own, "sweep.search=optuna", profile="mini")


def test_no_trial_says_that_it_chooses_on_more_samples_than_are_drawn():
    params = load(ROOT / "params.yaml", ["subsample.num_selection=150"], profile="mini")
    (line,) = unheard(params, cells(params, "hificl-table8", as_given(params)))
    assert line == "profile mini sets num_selection_samples=200, 150 are drawn and all used: " + ", ".join(
        dict.fromkeys(row.trial.task for row in trial_rows(params, ["hificl-table8"]))
    )
    rows = [row for row in trial_rows(params, ["hificl-table8"]) if row.trial.epochs]
    assert {row.trial.num_selection_samples for row in rows} == {150}
    assert all(row.sources["num_selection_samples"].startswith("subsample.num_selection") for row in rows)
    params = load(ROOT / "params.yaml", ["train.selection=test", "train.num_selection_samples=9999"])
    (line,) = unheard(params, cells(params, "hificl-table8", as_given(params)))
    assert line.startswith("train.num_selection_samples=9999 changes nothing here")
    real = load(ROOT / "params.yaml", profile="real")
    asked = {cell.task: cell.trial({}) for cell in cells(real, "mimic-table10", as_given(real)) if cell.row == "mimic"}
    assert {task: trial.num_selection_samples for task, trial in asked.items()}["mme"] == 100


# -- equal budgets -----------------------------------------------------------------------------------------------------

BUDGET = (
    "studies.own={title: o, backbones: [idefics2-8b-base], tasks: [vqav2], seeds: [0, 1], budget: BUDGET, methods: "
    "{zero-shot: {}, hificl: {}, hificl-k: {method: hificl, lowrank_k: false}, "
    "mimic: {search: {learning_rate: [0.01, 0.02], ground_truth_weight: [0.5, 8.0]}}}}"
)
SPACES = "{trials: 3, spaces: {hificl: {learning_rate: [0.001, 0.01, 0.1, 1.0]}}}"


@pytest.mark.parametrize("search", ["grid", "random"])
def test_every_row_that_trains_has_the_budgets_trials(search):
    params = load(ROOT / "params.yaml", [BUDGET.replace("BUDGET", SPACES), f"sweep.search={search}"], profile="mini")
    tried: dict[tuple[str, int], list] = {}
    for cell in cells(params, "own", as_given(params)):
        tried[cell.row, cell.seed] = points(cell, params)
    assert tried["zero-shot", 0] == [{}]
    rows = ("hificl", "hificl-k", "mimic")
    if search == "grid":
        assert {len(tried[row, seed]) for row in rows for seed in (0, 1)} == {3}
        assert all(tried[row, 0] == tried[row, 1] for row in rows)
        assert {tuple(point) for point in tried["mimic", 0]} == {("learning_rate", "ground_truth_weight")}


@pytest.mark.parametrize(
    ("budget", "more", "says"),
    [
        ("{trials: 3}", [], "no space is named.*budget.spaces.hificl"),
        (
            "{trials: 5, spaces: {hificl: {learning_rate: [0.1, 0.2]}}}",
            [],
            r"2 points, and every row.*5 trials \(and 5",
        ),
        (SPACES, ["sweep.search=optuna", "sweep.num_samples=2"], "budget is 3 trials a row.*num_samples to 3"),
        (
            SPACES,
            ["sweep.search=optuna", "sweep.num_samples=3", "sweep.warm_start=1"],
            "warm_start: .*than the study's budget",
        ),
    ],
)
def test_a_budget_that_a_row_cannot_have_is_refused(budget, more, says):
    with pytest.raises(InputError, match=says):
        plan("own", BUDGET.replace("BUDGET", budget), *more, profile="mini")


def test_a_space_grows_where_its_best_point_lies_at_an_end_as_often_as_it_may():
    text = "{trials: 3, widen: 2, spaces: {hificl: {learning_rate: [0.01, 0.02, 0.04]}}}"
    params = load(ROOT / "params.yaml", [BUDGET.replace("BUDGET", text)], profile="mini")
    known = cells(params, "own", as_given(params))
    cell = next(cell for cell in known if cell.row == "hificl")

    def rates(best: float, ended: bool = True) -> list[float]:
        """Return what is tried where the score falls off from `best`."""
        of_key = {
            cell.trial({"learning_rate": rate}).key: rate for rate in (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
        }
        return [
            point["learning_rate"]
            for point in tried(cell, params, lambda key: -abs(of_key[key] - best) if ended else None)
        ]

    assert rates(0.02) == [0.01, 0.02, 0.04]
    assert rates(1.0) == [0.01, 0.02, 0.04, 0.08, 0.16]
    assert rates(0.06) == [0.01, 0.02, 0.04, 0.08]  # 0.04 at an end, then 0.04 or 0.08: the first of equals, inside
    assert rates(0.0) == [0.01, 0.02, 0.04, 0.005, 0.0025]
    assert rates(1.0, ended=False) == [0.01, 0.02, 0.04]
    free = next(cell for cell in known if cell.row == "zero-shot")
    assert tried(free, params, lambda key: None) == [{}]
    text = "{trials: 4, widen: 1, spaces: {hificl: {learning_rate: [0.01, 0.02, 0.04, 0.08]}}}"
    params = load(ROOT / "params.yaml", [BUDGET.replace("BUDGET", text)], profile="mini")
    mimic = next(cell for cell in cells(params, "own", as_given(params)) if cell.row == "mimic")
    grown = tried(mimic, params, lambda key: -mimic_distance(mimic, key))[len(points(mimic, params)) :]
    assert {"learning_rate": 0.02, "ground_truth_weight": 128.0} in grown
    assert {"learning_rate": 0.04, "ground_truth_weight": 8.0} in grown


def mimic_distance(cell, key):
    """Return how far a point is from the upper corner of MimIC's grid."""
    corner = cell.trial({"learning_rate": 0.02, "ground_truth_weight": 8.0}).key
    return 0.0 if key == corner else 1.0


def test_trials_of_a_study_without_a_budget_keep_their_keys():
    params = load(ROOT / "params.yaml", profile="mini")
    planned = plan("miniature-search", profile="mini")
    given = {name for name, study in params.studies.items() if study.budget is not None}
    with_budget = {
        "miniature-baselines",
        "miniature-factorial",
        "miniature-fair",
        "miniature-world2",
        "miniature-world2-teachers",
        "real-weights",
        "real-weights-words",
    }
    assert given == with_budget
    assert len(planned.trials) == 54
