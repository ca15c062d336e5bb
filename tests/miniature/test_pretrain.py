"""Pre-training: texts and tokens, determinism, and checkpoints that transformers loads by itself."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from pipeline import backbones
from pipeline.core.errors import InputError
from pipeline.data.sample import ImageRef, Sample
from pipeline.miniature.decoder import SignHead
from pipeline.miniature.documents import CAPTION_PREFIX, VQA_PREFIX, Curriculum, DocumentSource
from pipeline.miniature.lexicon import QUESTIONS, draw_convention, signs
from pipeline.miniature.model import MINIATURES, SIZES, decode_hidden, encode_images, miniature, normalise
from pipeline.miniature.pretrain import BUDGETS, Budget, pretrain
from pipeline.miniature.render import draw_attributes, png_bytes, render_images
from pipeline.prompts.prompt import render
from pipeline.tasks import tasks

NAMES = sorted(MINIATURES)


@pytest.fixture(autouse=True)
def _one_thread():  # noqa: ANN202
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp(request.param)
    pretrain(request.param, out, seed=1, budget=Budget.tiny(), commit="abc", num_threads=1)
    return request.param, out


def source(name: str) -> DocumentSource:
    rng = np.random.default_rng(4)
    return DocumentSource(miniature(name), draw_attributes(50, rng), Curriculum(), rng)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["vqa", "facts", "captions"])
def test_pieces_tokenise_like_the_whole_text(name: str, kind: str) -> None:
    drawn = source(name)
    tokenizer = miniature(name).make_tokenizer()
    for _ in range(5):
        pieces, images = drawn.document(kind)
        ids, weights = drawn.renderer.encode(pieces)
        assert ids == tokenizer("".join(text for text, _ in pieces))["input_ids"]
        assert len(ids) == len(weights)
        assert tokenizer.unk_token_id not in ids or tokenizer.unk_token_id == tokenizer.pad_token_id
        assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 4 * len(images)


@pytest.mark.parametrize("name", NAMES)
def test_no_word_of_the_world_is_unknown(name: str) -> None:
    tokenizer = miniature(name).make_tokenizer()
    texts = [*QUESTIONS, VQA_PREFIX, CAPTION_PREFIX, "Image: Question: Answer: Caption:"]
    rng = np.random.default_rng(0)
    attributes = draw_attributes(100, rng)
    for values in attributes:
        convention = draw_convention(rng, redraw=0.5)
        texts.append(convention.caption(values))
        texts += [convention.answer(values, topic) for topic in range(len(QUESTIONS))]
    for text in texts:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("name", NAMES)
def test_answers_come_back_from_the_tokenizer(name: str) -> None:
    tokenizer = miniature(name).make_tokenizer()
    rng = np.random.default_rng(0)
    values = draw_attributes(1, rng)[0]
    convention = draw_convention(rng)
    for text in (convention.answer(values, 0), convention.caption(values)):
        ids = tokenizer(f" {text}\n")["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
        assert "\n" in tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", ["mini-vqa", "mini-okvqa", "mini-coco"])
def test_documents_are_what_the_pipeline_will_ask(name: str, task: str) -> None:
    """Pre-training's own rendering and `prompts.prompt` must give the same text, for lines and for chats."""
    drawn = source(name)
    renderer, template, convention = drawn.renderer, tasks.get(task).template, draw_convention(np.random.default_rng(0))
    topic = {"mini-vqa": 2, "mini-okvqa": 9, "mini-coco": None}[task]
    ours, samples = "", []
    for nth, values in enumerate(drawn.attributes[:3]):
        prefix = template.prefix if nth == 0 else ""
        if topic is None:
            pieces, target = renderer.caption(values, convention, prefix), convention.caption(values)
        else:
            pieces, target = renderer.vqa(values, topic, convention, prefix), convention.answer(values, topic)
        ours += "".join(text for text, _ in pieces)
        question = None if topic is None else QUESTIONS[topic]
        samples.append(Sample(task, nth, (ImageRef(f"{nth}.png"),), question, target, (target,)))
    theirs = render(template, backbones.get(name), samples[-1], samples[:-1], answer=True).text
    # The last pair's closing newline is what would separate it from a next one.
    assert ours.rstrip("\n") == theirs.replace("<image>", renderer.spec.image_text).rstrip("\n")


def test_weights_are_on_answers_and_their_ends() -> None:
    drawn = source("mini-llava")
    batch = drawn.collate("vqa", [drawn.document("vqa")])
    tokenizer = miniature("mini-llava").make_tokenizer()
    ids, weights = batch.input_ids[0], batch.weights[0]
    assert int((weights == 1).sum()) == Curriculum().num_pairs
    assert set(tokenizer.convert_ids_to_tokens(ids[weights == 0.1].tolist())) == {"<|im_end|>"}
    before = ids[torch.nonzero(weights == 1)[:, 0] - 1].tolist()
    assert set(tokenizer.convert_ids_to_tokens(before)) == {"Answer:"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["vqa", "facts", "captions"])
def test_whose_picture_it_is_is_read_where_each_answer_is_asked_for_and_begins(name: str, kind: str) -> None:
    spec, rng = miniature(name), np.random.default_rng(4)
    attributes = draw_attributes(50, rng)
    drawn = DocumentSource(spec, attributes, Curriculum(signed_share=1.0), rng)
    batch = drawn.collate(kind, [drawn.document(kind) for _ in range(2)])
    model = spec.build(0)
    head, seen = SignHead(model), {}
    for part in (head.asked, head.begun):
        part.register_forward_pre_hook(lambda part, states: seen.__setitem__(part, states[0]))
    visual = torch.randn(len(attributes), spec.visual_tokens, model.config.get_text_config().hidden_size)
    decode_hidden(model, batch.input_ids, visual[batch.images])
    assert head.loss(batch, torch.from_numpy(signs(attributes))).item() == pytest.approx(2 * np.log(2))
    ids = batch.input_ids.flatten().tolist()
    states = head._states.flatten(0, 1)
    tokenizer = spec.make_tokenizer()
    for part, wanted in ((head.asked, 0), (head.begun, 1)):
        assert len(seen[part]) == len(batch.images)
        for state in seen[part]:
            (at,) = torch.nonzero((states == state).all(1)).flatten().tolist()
            role = tokenizer.convert_ids_to_tokens(ids[at - wanted])
            assert role == ("Caption:" if kind == "captions" else "Answer:")


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_weights(name: str, tmp_path: Path) -> None:
    weights = []
    for nth, seed in enumerate((1, 1, 2)):
        pretrain(name, tmp_path / str(nth), seed=seed, budget=Budget.tiny(2), num_threads=1)
        weights.append((tmp_path / str(nth) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_record_holds_what_made_the_weights(checkpoint: tuple[str, Path]) -> None:
    name, folder = checkpoint
    record = json.loads((folder / "pretraining.json").read_text())
    assert (record["backbone"], record["seed"], record["commit"], record["num_threads"]) == (name, 1, "abc", 1)
    assert record["budget"]["vision"]["steps"] == record["vision"][-1]["step"]
    assert set(record["decoder"][-1]) >= {"loss", "seen", "unseen", "right_value"}


def test_unknown_backbone_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'mini-llava'"):
        pretrain("mini-lava", tmp_path)
    with pytest.raises(InputError, match="Did you mean 'large'"):
        pretrain("mini-llava", tmp_path, size="larger")


@pytest.mark.parametrize("name", NAMES)
def test_the_large_size_is_the_same_backbone(name: str, tmp_path: Path) -> None:
    record = pretrain(name, tmp_path, size="large", budget=Budget.tiny(1), num_threads=1)
    assert record["parameters"] > 10 * sum(p.numel() for p in miniature(name).build(0).parameters())
    loaded = backbones.load(name, weights=tmp_path)  # `backbones.<name>.weights` of params.yaml
    assert loaded.model.config.get_text_config().num_hidden_layers == 8
    assert BUDGETS[1].keys() == SIZES.keys() and BUDGETS[1]["large"].decoder.steps > BUDGETS[1]["small"].decoder.steps


def test_pixels_and_cached_visual_tokens_agree(checkpoint: tuple[str, Path]) -> None:
    """PNG -> processor -> model equals uint8 -> own normalisation -> cached visual tokens."""
    name, folder = checkpoint
    spec = miniature(name)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    images = render_images(draw_attributes(3, rng), rng)
    opened = [Image.open(io.BytesIO(png_bytes(image))) for image in images]
    text = "Image: <image> Question: Which colour? Answer: redak\n" * 3
    inputs = processor(text=[text], images=[opened] if spec.image_axis else opened, return_tensors="pt")
    pixels = normalise(torch.from_numpy(images))
    assert torch.allclose(inputs["pixel_values"].view_as(pixels), pixels, atol=1e-6)
    with torch.no_grad():
        by_pixels = model(**inputs).logits
        visual, _ = encode_images(spec, model, pixels)
        by_tokens = model.lm_head(decode_hidden(model, inputs["input_ids"], visual))
    assert torch.allclose(by_pixels, by_tokens, atol=1e-4)
    assert by_pixels.std() > 0


def test_tokenizer_fits_the_embedding(checkpoint: tuple[str, Path]) -> None:
    name, folder = checkpoint
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == model.lm_head.out_features
    assert tokenizer("Which colour?")["input_ids"] == miniature(name).make_tokenizer()("Which colour?")["input_ids"]
    assert model.dtype == torch.float32 or model.dtype == torch.float16


@pytest.mark.parametrize(("phase", "step"), [("vision", 2), ("vision", 4), ("decoder", 2), ("decoder", 4)])
def test_what_was_interrupted_goes_on_to_the_same_weights(checkpoint, tmp_path, phase, step) -> None:
    name, _ = checkpoint
    budget = Budget.tiny(5)
    decoder = replace(budget.decoder, log_every=2, sign_weight=0.3)  # its head goes on too
    budget = replace(budget, vision=replace(budget.vision, log_every=2), decoder=decoder)
    whole = pretrain(name, tmp_path / "whole", budget=budget, commit="abc", num_threads=1)
    said: list[str] = []

    def interrupted(done: int, total: int | None = None, note: str = "") -> None:
        said.append(note)
        if note.startswith(phase) and done == step:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pretrain(name, out, budget=budget, commit="abc", num_threads=1, progress=interrupted)
    assert [path.name for path in out.iterdir()] == ["unfinished.safetensors"]
    steps = len(said)
    again = pretrain(name, out, budget=budget, commit="abc", num_threads=1, progress=lambda *a, **k: said.append(a[-1]))
    assert f"going on after step {step} of {phase}" in said[steps]
    assert len(said) - steps < 7  # a record of each step that was left: not all six again, and the images
    assert not (out / "unfinished.safetensors").exists()
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert {key: again[key] for key in ("vision", "decoder")} == {key: whole[key] for key in ("vision", "decoder")}


def test_another_seed_or_code_begins_anew(tmp_path) -> None:
    def interrupted(done: int, total: int | None = None, note: str = "") -> None:
        if note.startswith("decoder"):
            raise KeyboardInterrupt

    said: list[str] = []
    for changed in ({"seed": 2}, {"commit": "def"}):
        with pytest.raises(KeyboardInterrupt):
            pretrain(NAMES[0], tmp_path, budget=Budget.tiny(), commit="abc", num_threads=1, progress=interrupted)
        asked = {"commit": "abc", "budget": Budget.tiny(), **changed}
        pretrain(NAMES[0], tmp_path, num_threads=1, progress=lambda *a, **k: said.append(a[-1]), **asked)
        assert "going on" not in " ".join(said)
