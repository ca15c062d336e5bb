"""lmms-eval and lm-evaluation-harness ask an adapter, or a backbone behind demonstrations, and get our own answers.

The tests marked `harness` run both programs from the package index (`make test-harness`).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from datasets import Image as ImageColumn
from PIL import Image

from pipeline import adapters, backbones
from pipeline.backbones.load import Loaded
from pipeline.baselines.demonstrations import draw_from
from pipeline.config.schema import BackboneSource
from pipeline.config.trial import EvaluationConfig
from pipeline.core.errors import InputError
from pipeline.data.manifest import Manifest
from pipeline.data.sample import Sample
from pipeline.evaluate import harness
from pipeline.evaluate.generate import generate
from pipeline.prompts.prompt import encode_all, render, stop_strings
from pipeline.records.evaluation import Evaluation
from pipeline.resident.visual_tokens import VisualTokens
from pipeline.tasks import tasks
from pipeline.train.workbench import Workbench
from tests.conftest import ROOT
from tests.support import tiny_hub

MOST = 5  # new tokens
PAGE = (ROOT / "docs/adapters.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.timeout(900)


class Asked:
    """A trial of a trained method and one of `icl-k`, what our own evaluation says of them, and files for a harness."""

    def __init__(self, trial: Any, folder: Path) -> None:
        bench = Workbench(device="cpu", batch_size=2)
        trained = trial("hificl", folder / "runs", epochs=1, learning_rate=0.05)
        bench.admit(trained)
        while bench.loop.trials:
            bench.advance()
        shown = trial("icl-k", folder / "runs", num_shots=2, demonstrations="fixed")
        evaluation = EvaluationConfig(trial="-", split="evaluation", max_new_tokens=MOST)
        self.folder, self.adapter = folder, Path(trained.folder) / "adapter"
        self.ours: dict[str, Evaluation] = {
            "adapter": bench.score(trained, evaluation),
            "shots": bench.score(shown, evaluation),
        }
        manifest = Manifest.load(Path(trained.manifest))
        self.samples, self.root = manifest.splits["evaluation"], manifest.image_root
        self.answers = [sample.references[0] for sample in self.samples]
        self.choices = sorted({*self.answers, "zebra", "lorry"})
        pool = manifest.splits["train"][: shown.config.num_train_samples]
        rows = [
            {"id": s.sample_id, "image": str(Path(self.root) / s.images[0].path), "question": s.question,
             "answer": s.shown} for s in pool
        ]  # fmt: skip
        self.solved = folder / "solved.jsonl"
        for row in rows:
            (folder / "pool").mkdir(exist_ok=True)
            file = folder / "pool" / Path(row["image"]).name
            file.write_bytes(Path(row["image"]).read_bytes())
            row["image"] = f"pool/{file.name}"
        self.solved.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    @property
    def questions(self) -> list[harness.Asked]:
        """What a harness asks of the evaluation split."""
        return [
            harness.Asked(i, sample.question or "", (Image.open(Path(self.root) / sample.images[0].path),))
            for i, sample in enumerate(self.samples)
        ]

    def predictions(self, which: str) -> list[str]:
        """Return our own answers."""
        return [prediction.prediction for prediction in self.ours[which].predictions]


@pytest.fixture(scope="module")
def asked(trial: Any, tmp_path_factory: Any) -> Asked:
    return Asked(trial, tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: Any) -> dict[str, str]:
    """A random text decoder in the hub's layout; a LoRA in PEFT's, and a HiFICL adapter with a prompt of its own."""
    folder = tmp_path_factory.mktemp("text")
    name = f"folder:{tiny_hub.make('llama', folder / 'llama')}"
    loaded = backbones.load_from(name, BackboneSource.spelled(name) or BackboneSource())
    for method, options in (("lora", {"scope": "decoder"}), ("hificl", {})):
        adapter = adapters.create(method, loaded.model, **options)
        stirred(adapter)
        if method == "hificl":
            adapter.extra = {"template": {"text": "Question: {question} Answer:", "stop": ["\n"]}}
        adapter.save_pretrained(folder / method)
    return {"name": name, **{part: str(folder / part) for part in ("llama", "lora", "hificl")}}


def stirred(adapter: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)


def by_hand(loaded: Loaded, ids: list[int], answer: int) -> float:
    """Return the log-probability of the last `answer` tokens of a text."""
    with torch.no_grad():
        said = loaded.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return float(said[torch.arange(len(ids) - 1), ids[1:]][-answer:].sum())


# ------------------------------------------------------------------------------------------- what stands behind both


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_adapter_answers_a_harness_as_our_own_evaluation(asked: Asked, batch_size: int):
    prompted = harness.Prompted(adapter=str(asked.adapter), batch_size=batch_size)
    answers = prompted.write(asked.questions, harness.Writing(MOST))
    assert answers == asked.predictions("adapter") and any(answers)
    plain = harness.Prompted("mini-idefics2", task="mini-vqa")
    assert plain.loglikelihoods(asked.questions, answers) != prompted.loglikelihoods(asked.questions, answers)


def test_demonstrations_from_a_file_are_those_of_icl(asked: Asked):
    given: dict[str, Any] = {"task": "mini-vqa", "shots": 2, "demonstrations": str(asked.solved)}
    prompted = harness.Prompted("mini-idefics2", draw="fixed", batch_size=2, **given)
    assert prompted.write(asked.questions, harness.Writing(MOST)) == asked.predictions("shots")
    # and by the document's number, each question has its own
    drawn = harness.Prompted("mini-idefics2", seed=3, **given)
    template = tasks.get("mini-vqa").template
    rendered = []
    for i, sample in enumerate(asked.samples):
        query = Sample("", f"document {i}", sample.images, sample.question, "", ())
        rendered.append(render(template, drawn.loaded.backbone, query, draw_from(drawn.pool, query, 2, 3)))
    assert len({prompt.text for prompt in rendered}) == len(rendered)
    expected = generate(
        drawn.loaded, encode_all(drawn.loaded, rendered, root=asked.root), max_new_tokens=MOST, root=asked.root,
        visual_tokens=VisualTokens(drawn.loaded, None), stop_strings=stop_strings(template, drawn.loaded.backbone),
    )  # fmt: skip
    assert drawn.write(asked.questions, harness.Writing(MOST)) == expected


def test_a_continuation_is_as_likely_as_the_model_says(asked: Asked):
    prompted = harness.Prompted(adapter=str(asked.adapter), batch_size=3)
    loaded, questions = prompted.loaded, asked.questions
    answers = [f" {text}" for text in asked.predictions("adapter")]
    expected = []
    with torch.no_grad(), adapters.attach(loaded.model, prompted.adapter):
        for question, sample, answer in zip(questions, asked.samples, answers, strict=True):
            text = render(prompted.prompt.template, loaded.backbone, sample).text
            inputs = loaded.processor(text=[text + answer], images=[list(question.pictures)], return_tensors="pt")
            ids = inputs["input_ids"][0]
            tokens = len(loaded.tokenizer(answer, add_special_tokens=False)["input_ids"])
            said = loaded.model(**inputs).logits[0, :-1].log_softmax(-1)
            expected.append(float(said[torch.arange(len(ids) - 1), ids[1:]][-tokens:].sum()))
    for question, answer, value in zip(questions, answers, expected, strict=True):
        ((found, greedy),) = prompted.loglikelihoods([question], [answer])
        assert found == pytest.approx(value, abs=1e-4) and greedy
    together = prompted.loglikelihoods(questions, answers)
    other = prompted.loglikelihoods(questions, [" zebra"] * len(questions))
    assert all(right[0] > wrong[0] and not wrong[1] for right, wrong in zip(together, other, strict=True))


def test_an_adapter_that_was_wrapped_asks_in_the_prompt_that_wrap_was_given(text: dict[str, str]):
    prompted = harness.Prompted(text["name"], text["hificl"])
    template = prompted.prompt
    query = Sample("", 0, (), "{which} colour?", "red", ())
    assert template.rendered(query, ()).text == "Question: {which} colour? Answer:"
    assert template.rendered(query, [query], " red").text == (
        "Question: {which} colour? Answer: red\nQuestion: {which} colour? Answer: red"
    )
    ((found, _),) = prompted.loglikelihoods([harness.Asked(0, "Which colour?")], [" red"])
    tokenizer = prompted.loaded.tokenizer
    ids, most = (
        tokenizer("Question: Which colour? Answer: red")["input_ids"],
        tokenizer(" red", add_special_tokens=False),
    )
    with adapters.attach(prompted.loaded.model, prompted.adapter):
        assert found == pytest.approx(by_hand(prompted.loaded, ids, len(most["input_ids"])), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "no backbone is named"),
        ({"backbone": "mini-idefics2", "shots": 2}, "demonstrations have to come from a file"),
        ({"backbone": "mini-idefics2", "shots": "some"}, "shots: is some"),
        ({"backbone": "mini-idefics2", "draw": "best"}, "draw: is best"),
        ({"backbone": "mini-idefics2", "shot": 2}, "unknown 'shot'"),
    ],
)
def test_what_does_not_fit_is_refused_before_work(arguments: dict[str, Any], said: str):
    with pytest.raises(InputError, match=re.escape(said)):
        harness.Prompted(**arguments)


def test_samples_are_refused_and_so_are_further_processes(monkeypatch: pytest.MonkeyPatch):
    assert harness.Writing.of({"until": "\n", "max_gen_toks": 7, "do_sample": False, "temperature": 0}) == (
        harness.Writing(7, ("\n",))
    )
    with pytest.raises(InputError, match="not a sample"):
        harness.Writing.of({"do_sample": True, "temperature": 0.7})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        harness.opened("mini-idefics2", None)


def test_the_entry_point_leads_to_the_plug_in():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (point,) = project["entry-points"]["lmms_eval.models"].items()
    assert metadata.EntryPoint(*point, group="lmms_eval.models").load() is harness.lmms_eval_models
    assert {"LmmsModel", "TextModel"} == set(harness._MADE)
    with pytest.raises(AttributeError, match="no attribute 'Model'"):
        harness.Model  # noqa: B018 - looked up


def test_what_make_test_harness_installs_is_pinned_and_fits_beside_the_environment():
    def pins(file: str) -> dict[str, str]:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        return dict(line.split(" ;")[0].split("==") for line in lines if line and not line.startswith("#"))

    beside = pins("tests/harness.txt")
    assert {"lm-eval", "lmms-eval"} <= set(beside)
    assert set(beside).isdisjoint(pins("requirements.txt")), "what .venv has is taken from there"


# ---------------------------------------------------------------------------------------------- the programs themselves

FUNCTIONS = """
from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val as score

def pictures(doc):
    return [doc["image"]]

def question(doc, kwargs=None):
    return doc["question"]
"""
PICTURES = """
task: {name}
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: {output}
doc_to_visual: !function functions.pictures
doc_to_text: !function functions.question
doc_to_target: {target}
{more}
"""
WRITTEN = """generation_kwargs: {until: ["\\n"], max_new_tokens: 5, do_sample: false, temperature: 0}
process_results: !function functions.score
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""
CHOSEN = """doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""
TEXT = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
fewshot_split: train
doc_to_text: "{question}"
output_type: {output}
{more}
"""
TEXTS = {
    "colours": ("Question: {{question}} Answer:", "generate_until"),
    "asked": ("{{question}}", "generate_until"),
    "chosen": ("Question: {{question}} Answer:", "multiple_choice"),
}
OF_TEXTS = {
    "generate_until": """doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5}
metric_list: [{metric: exact_match}]""",
    "multiple_choice": """doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc}]""",
}


@pytest.fixture(scope="module")
def folder(asked: Asked, text: dict[str, str]) -> Path:
    """A folder as docs/adapters.md has it: tasks of both harnesses, a trial's adapter, a decoder with a LoRA."""
    made = asked.folder / "page"
    (made / "tasks").mkdir(parents=True)
    (made / "runs/KEY").mkdir(parents=True)
    for name, target in {
        "checkpoints": ROOT / "checkpoints", "runs/KEY/adapter": asked.adapter, "decoder": text["llama"],
        "lora": text["lora"], "wrapped": text["hificl"], "solved.jsonl": asked.solved, "pool": asked.folder / "pool",
    }.items():  # fmt: skip
        (made / name).symlink_to(target)
    rows: list[dict[str, Any]] = [
        {
            "image": str(Path(asked.root) / sample.images[0].path), "question": sample.question, "answer": answer,
            "answers": [{"answer": text, "answer_id": i} for i, text in enumerate(sample.references)],
            "question_id": i, "question_type": "what", "answer_type": "other", "multiple_choice_answer": answer,
            "choices": asked.choices, "gold": asked.choices.index(answer),
        } for i, (sample, answer) in enumerate(zip(asked.samples, asked.answers, strict=True))
    ]  # fmt: skip
    data = Dataset.from_list(rows).cast_column("image", ImageColumn())
    DatasetDict({"test": data}).save_to_disk(made / "data")
    for name, output, target, more in (
        ("shapes", "generate_until", "answer", WRITTEN),
        ("choices", "multiple_choice", "gold", CHOSEN),
    ):
        task = PICTURES.format(name=name, data=made / "data", output=output, target=target, more=more)
        (made / "tasks" / f"{name}.yaml").write_text(task)
    (made / "tasks/functions.py").write_text(FUNCTIONS)
    (made / "texts").mkdir()
    plain = [{key: row[key] for key in ("question", "answer", "choices", "gold")} for row in rows]
    (made / "texts/rows.json").write_text("".join(json.dumps(row) + "\n" for row in plain))
    for name, (question, output) in TEXTS.items():
        task = TEXT.format(
            name=name, data=made / "texts/rows.json", question=question, output=output, more=OF_TEXTS[output]
        )
        (made / "texts" / f"{name}.yaml").write_text(task)
    return made


def run(folder: Path, line: str) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Run a line of the page; return what the harness says of each task, and its samples by task."""
    program, *words = shlex.split(line)
    assert program == "python"
    out = folder / f"out-{len(list(folder.glob('out-*')))}"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *words, "--output_path", str(out), "--log_samples"], cwd=folder, check=False, timeout=600,
        capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("*results*.json")
    samples = {}
    for file in out.rglob("*samples*.jsonl"):
        name = next(name for name in (*TEXTS, "shapes", "choices") if f"samples_{name}" in file.name)
        rows = [json.loads(row) for row in file.read_text(encoding="utf-8").splitlines()]
        samples[name] = sorted(rows, key=lambda row: row["doc_id"])
    return json.loads(results.read_text(encoding="utf-8"))["results"], samples


def answer_in(row: dict[str, Any]) -> str:
    """Return the text of a generation's sample."""
    said = row["filtered_resps"]
    while not isinstance(said, str):
        (said,) = said
    return said


def lines(program: str) -> list[str]:
    """Return the page's lines that start a program."""
    text = PAGE.replace("\\\n", " ")
    return [line for line in text.splitlines() if line.startswith(f"python -m {program} ")]


def test_a_wrapped_text_decoder_answers_in_its_adapters_prompt(text: dict[str, str]):
    """Its tokenizer stands in the place of a processor, and moves nothing to a dtype."""
    loaded, adapter, _ = harness.opened(text["name"], text["hificl"])
    ids = loaded.tokenizer("Question: What is red? Answer:", return_tensors="pt")["input_ids"]
    with adapters.attach(loaded.model, adapter):
        written = loaded.model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    expected = loaded.tokenizer.decode(written, skip_special_tokens=True).partition("\n")[0].strip()
    model = adapters.wrap(loaded.model, adapter, processor=loaded.tokenizer)
    assert model.ask(None, " What is red? ", max_new_tokens=5) == expected


@pytest.mark.harness
def test_the_plug_in_is_what_lmms_eval_takes_for_a_model():
    models = import_module("lmms_eval.models")
    found = models.get_model("hificl", True)
    assert found is harness.LmmsModel and issubclass(found, import_module("lmms_eval.api.model").lmms)
    assert not found.__abstractmethods__ and not harness.TextModel.__abstractmethods__


@pytest.mark.harness
def test_lmms_eval_scores_as_our_own_evaluation_does(asked: Asked, folder: Path):
    trained, shown = lines("lmms_eval")
    for line, which in ((trained.replace("shapes", "shapes,choices"), "adapter"), (shown, "shots")):
        results, samples = run(folder, line)
        assert list(map(answer_in, samples["shapes"])) == asked.predictions(which)
        assert 100 * results["shapes"]["exact_match,none"] == pytest.approx(asked.ours[which].value)
        if "choices" in samples:
            prompted = harness.Prompted(adapter=str(asked.adapter))
            texts = [f" {choice}" for choice in asked.choices]
            right = []
            for question, answer in zip(asked.questions, asked.answers, strict=True):
                scored = prompted.loglikelihoods([question] * len(texts), texts)
                best = max(range(len(texts)), key=lambda i: scored[i][0])
                right.append(asked.choices[best] == answer)
            assert results["choices"]["acc,none"] == pytest.approx(sum(right) / len(right))


@pytest.mark.harness
@pytest.mark.parametrize("adapter", [None, "lora"])
def test_lm_eval_scores_a_decoder_as_its_own_model_does(folder: Path, adapter: str | None):
    (line,) = lines("pipeline.evaluate.harness")
    line = line.replace("--tasks colours", "--tasks colours,chosen --num_fewshot 2")
    assert "adapter=lora" in line
    ours, theirs = line.replace(",adapter=lora", ",adapter=lora" if adapter else ""), "pretrained=decoder,dtype=float32"
    theirs += ",peft=lora" if adapter else ""
    reference = re.sub(r"--model hificl --model_args \S+", f"--model hf --model_args {theirs} --device cpu", line)
    (results, samples), (expected, of_hf) = run(folder, ours), run(folder, reference)
    assert [row["filtered_resps"] for row in samples["colours"]] == [row["filtered_resps"] for row in of_hf["colours"]]
    for row, other in zip(samples["chosen"], of_hf["chosen"], strict=True):
        for (value, greedy), (wanted, as_greedy) in zip(row["filtered_resps"], other["filtered_resps"], strict=True):
            assert float(value) == pytest.approx(float(wanted), abs=1e-3) and greedy == as_greedy
    for task, metric in (("colours", "exact_match,none"), ("chosen", "acc,none")):
        assert results[task][metric] == pytest.approx(expected[task][metric])


@pytest.mark.harness
def test_lm_eval_asks_in_the_prompt_that_the_adapter_was_trained_with(folder: Path, text: dict[str, str]):
    given = "backbone=folder:decoder,adapter=wrapped,prompt=adapter"
    _, samples = run(
        folder, f"python -m pipeline.evaluate.harness --model hificl --model_args {given} --tasks asked "
        "--include_path texts --gen_kwargs max_gen_toks=5 --device cpu"
    )  # fmt: skip
    loaded, adapter, _ = harness.opened(text["name"], text["hificl"])
    model = adapters.wrap(loaded.model, adapter, processor=loaded.tokenizer)
    said = [model.ask(None, row["doc"]["question"], max_new_tokens=5) for row in samples["asked"]]
    assert [answer_in(row).strip() for row in samples["asked"]] == said and any(said)
