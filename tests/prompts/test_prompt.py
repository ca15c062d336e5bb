"""Prompts: the papers' wording, the real processor's token ids, the answer's exact tokens, and the draw of demos."""

from __future__ import annotations

import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken

from pipeline import backbones
from pipeline.core.errors import InputError
from pipeline.data.sample import ImageRef, Sample
from pipeline.prompts.prompt import draw_demos, encode_all, render, stop_strings, template_of
from pipeline.tasks.caption_files import CAPTION_TEMPLATE as CAPTION
from pipeline.tasks.vqa import VQA_TEMPLATE as VQA

PLAIN = [name for name in backbones.names() if backbones.get(name).chat is None]
CHATML = [name for name in backbones.names() if backbones.get(name).chat == backbones.get("llava-interleave-7b").chat]


def sample(i, question="What color is the dog?", target="red", images=1):
    refs = tuple(ImageRef(f"{(i + j) % 7}.png") for j in range(images))
    return Sample("vqav2", i, refs, question, target, (target,))


def encode(loaded, rendered, *, image_sizes=None, root=""):
    return encode_all(loaded, [rendered], image_sizes=image_sizes and [image_sizes], root=root)[0]


def by_the_processor(loaded, text, images):
    """Token ids from the real processor class itself."""
    if loaded.family.model_type == "idefics":  # its processor takes text and images in turn
        parts, left = text.split(loaded.backbone.image_token), iter(images)
        prompt = [parts[0]]
        for part in parts[1:]:
            prompt += [next(left), part]
        ids = loaded.processor(text=[[p for p in prompt if p != ""]], return_tensors="pt")["input_ids"]
    elif loaded.family.model_type == "llava_onevision":
        if len(images) == 1:
            pytest.skip("by design an image that is alone is read as one of several is")
        ids = loaded.processor(text=text, images=[images], return_tensors="pt")["input_ids"]
    else:
        ids = loaded.processor(text=text, images=images, return_tensors="pt")["input_ids"]
    return ids[0].tolist()


@pytest.mark.parametrize("name", PLAIN)
def test_plain_backbones_read_the_papers_lines(name):
    facts = backbones.get(name)
    demos = [sample(1, "Where?", "beach"), sample(2, "How many?", "2")]
    shown = facts.image_text
    assert render(VQA, facts, sample(0), demos).text == (
        "Instruction: provide an answer to the question. Use the image to answer.\n"
        f"Image: {shown} Question: Where? Answer: beach\n"
        f"Image: {shown} Question: How many? Answer: 2\n"
        f"Image: {shown} Question: What color is the dog? Answer:"
    )
    assert render(CAPTION, facts, sample(0, None)).text == f"Image: {shown} Caption:"
    assert render(CAPTION, facts, sample(0, None, "a dog"), demos[:1], answer=True).text == (
        "Instruction: provide a short caption of the input image.\n"
        f"Image: {shown} Caption: beach\nImage: {shown} Caption: a dog\n"
    )


@pytest.mark.parametrize("name", CHATML)
def test_chat_backbones_read_the_same_words_in_turns(name):
    facts = backbones.get(name)
    shown = facts.image_text
    assert render(VQA, facts, sample(0), [sample(1, "Where?", "beach")]).text == (
        "<|im_start|>user\nInstruction: provide an answer to the question. Use the image to answer.\n"
        f"Image: {shown} Question: Where?<|im_end|>\n<|im_start|>assistant\nAnswer: beach<|im_end|>\n"
        f"<|im_start|>user\nImage: {shown} Question: What color is the dog?<|im_end|>\n<|im_start|>assistant\nAnswer:"
    )
    assert render(CAPTION, facts, sample(0, None, "a dog"), answer=True).text == (
        f"<|im_start|>user\nImage: {shown}<|im_end|>\n<|im_start|>assistant\nCaption: a dog<|im_end|>"
    )


@pytest.mark.parametrize("name", backbones.names())
@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("images", [1, 2])
def test_expanded_as_the_real_processor_expands(name, shots, images, tiny, pictures):
    loaded = tiny(name)
    demos = [sample(1 + i) for i in range(shots)]
    rendered = render(VQA, loaded.backbone, sample(0, images=images), demos, answer=True)
    opened = [Image.open(pictures / image.path) for image in rendered.images]
    expected = by_the_processor(loaded, rendered.text, opened)
    sizes = [(image.height, image.width) for image in opened]
    assert list(encode(loaded, rendered, image_sizes=sizes).input_ids) == expected


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("idefics2-8b-base", {(480, 640): 64 + 2, (224, 224): 64 + 2}),
        ("llava-interleave-7b", {(480, 640): 729, (224, 224): 729}),
        ("idefics-9b", {(480, 640): 1 + 2}),
        ("llava-v1.6-mistral-7b", {(224, 224): 1176, (384, 384): 2928, (480, 640): 2340, (1080, 1920): 1948}),
        ("llava-onevision-qwen2-7b", {(224, 224): 730, (480, 640): 730}),
        ("qwen3-vl-8b", {(224, 224): 64 + 2, (480, 640): 300 + 2, (672, 672): 441 + 2, (1080, 1920): 2040 + 2}),
    ],
)
def test_an_image_takes_as_many_tokens_as_published(name, tokens, tiny):
    """The published settings, around a small tokenizer; markers counted."""
    loaded = tiny(name)
    facts, family = loaded.backbone, loaded.family
    processor = family.build_processor(family.train_tokenizer(["a b"], facts.special_tokens), facts.processor)
    for size, number in tokens.items():
        expanded = family.expand(facts.image_text, processor, [size])
        assert len(processor.tokenizer(expanded, add_special_tokens=False).input_ids) == number, size


def test_sizes_are_read_from_the_files_where_they_matter(tiny, pictures):
    loaded = tiny("llava-v1.6-mistral-7b")
    rendered = render(VQA, loaded.backbone, sample(3), [sample(4)])
    sizes = [(30, 90), (40, 56)]
    assert encode(loaded, rendered, root=pictures) == encode(loaded, rendered, image_sizes=sizes)
    with pytest.raises(InputError, match=r"[34]\.png"):
        encode(loaded, rendered, root=pictures / "elsewhere")


@pytest.mark.parametrize("name", backbones.names())
@pytest.mark.parametrize("target", ["red", "2", "a dog, on (the) grass.", "Œuvre 汉字 🙂", "'s", "10:30"])
def test_answer_span_is_exact(name, target, tiny):
    loaded = tiny(name)
    facts, tokenizer = loaded.backbone, loaded.tokenizer
    demos = [sample(1, "Where?", "beach")]
    sizes = [(56, 56)] * 2
    closed = encode(loaded, render(VQA, facts, sample(0, target=target), demos, answer=True), image_sizes=sizes)
    opened = encode(loaded, render(VQA, facts, sample(0, target=target), demos), image_sizes=sizes)
    start, end = closed.answer_span
    assert opened.answer_span is None
    assert opened.input_ids == closed.input_ids[:start]
    assert end == len(closed)
    terminator = facts.chat.terminator if facts.chat else "\n"
    answer = tokenizer.decode(closed.input_ids[start:end], skip_special_tokens=False)
    assert answer.endswith(terminator)
    assert answer.removesuffix(terminator).strip() == target
    assert tokenizer.decode(closed.input_ids[end - 1 :]).strip(" ") == terminator  # learnt as one last token
    bos = tokenizer.bos_token_id
    if bos is not None:
        assert closed.input_ids.count(bos) == 1 and closed.input_ids[0] == bos
    query = tokenizer.decode(closed.input_ids[closed.query_start : start], skip_special_tokens=False)
    first = facts.chat.user_open.strip() if facts.chat else "Image"
    assert query.lstrip().startswith(first) and "beach" not in query


@pytest.mark.parametrize("name", backbones.names())
def test_answers_follow_the_query_in_the_same_tokens(name, tiny):
    """From the end, query and answer have the same tokens with demonstrations and without: a teacher needs that."""
    loaded = tiny(name)
    sizes = [(56, 56)] * 3
    alone = encode(loaded, render(VQA, loaded.backbone, sample(0), answer=True), image_sizes=sizes)
    shown = encode(
        loaded, render(VQA, loaded.backbone, sample(0), [sample(1), sample(2)], answer=True), image_sizes=sizes
    )
    asked = min(len(alone) - alone.query_start, len(shown) - shown.query_start)
    if loaded.backbone.chat is not None:
        asked -= alone.answer_span[0]  # the instruction stands inside the only turn
        asked = max(asked, len(alone) - alone.answer_span[0])
    assert alone.input_ids[-asked:] == shown.input_ids[-asked:]


@pytest.mark.parametrize("name", backbones.names())
def test_special_tokens_in_the_data_stay_text(name, tiny):
    loaded = tiny(name)
    evil = "".join(sorted(set(loaded.backbone.special_tokens.values()))) + " {image} {0}"
    encoded = encode(
        loaded, render(VQA, loaded.backbone, sample(0, question=evil, target=evil), answer=True), image_sizes=[(56, 56)]
    )
    reference = encode(loaded, render(VQA, loaded.backbone, sample(0), answer=True), image_sizes=[(56, 56)])
    special = [loaded.tokenizer.convert_tokens_to_ids(t) for t in set(loaded.backbone.special_tokens.values())]
    unknown = loaded.tokenizer.unk_token_id
    for token in special:
        if token != unknown:
            assert encoded.input_ids.count(token) == reference.input_ids.count(token)


EXTRA = ("<tool_call>", "<|object_ref_start|>", "[PAD7]", "<end_of_utterance>", "<extra", "<extra_id_0>", "q", "  ")


@pytest.mark.parametrize("name", backbones.names())
@pytest.mark.parametrize("more", [(), EXTRA], ids=["its own", "and others"])
def test_tokens_that_only_the_tokenizer_knows_stay_text(name, more):
    """Every added token: in a question and in an answer, alone, twice, and glued to letters."""
    load = sys.modules["pipeline.backbones.load"]
    loaded = backbones.load(name, variant="tiny")
    tokenizer, embedding = loaded.tokenizer, loaded.model.get_input_embeddings()
    rows = embedding.num_embeddings + getattr(embedding, "num_additional_embeddings", 0)
    for number, text in enumerate(more):  # past the embedding's end, as Idefics2's is
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=bool(number % 2))])
    loaded = load._ready(loaded)
    added = tokenizer.get_added_vocab()
    assert set(more) | set(loaded.backbone.special_tokens.values()) <= set(added) == set(loaded.backbone.added_tokens)
    plain = encode(loaded, render(VQA, loaded.backbone, sample(0), answer=True), image_sizes=[(56, 56)])
    for token in (token for token in added if len(token.strip()) > 1):
        said = f"{token[0]} {token[1:]}"
        for text, stays in ((token, said), (token * 2, said * 2), (f"a{token}b", f"a{said}b")):
            asked = sample(0, question=text, target=text)
            encoded = encode(loaded, render(VQA, loaded.backbone, asked, answer=True), image_sizes=[(56, 56)])
            for known in added.values():
                if known != tokenizer.unk_token_id:
                    assert encoded.input_ids.count(known) == plain.input_ids.count(known)
            assert max(encoded.input_ids) < rows
            start, end = encoded.answer_span
            answer = tokenizer.decode(encoded.input_ids[start:end], skip_special_tokens=True)
            assert answer.strip() == stays
            assert stays in tokenizer.decode(encoded.input_ids[encoded.query_start : start], skip_special_tokens=True)


def test_line_breaks_inside_an_answer_become_spaces(tiny):
    loaded = tiny("idefics2-8b-base")
    rendered = render(CAPTION, loaded.backbone, sample(0, None, " a dog\n on grass \n"), answer=True)
    assert rendered.text[slice(*rendered.answer_span)] == " a dog on grass\n"


def test_many_prompts_encode_as_one_by_one(tiny):
    loaded = tiny("idefics2-8b-base")
    rendered = [render(VQA, loaded.backbone, sample(i), [sample(i + 1)] * (i % 3), answer=i % 2 == 0) for i in range(5)]
    assert encode_all(loaded, rendered) == [encode(loaded, r) for r in rendered]
    assert encode_all(loaded, []) == []


def test_prompts_beyond_the_context_are_refused(tiny):
    loaded = tiny("mini-idefics2")
    says = r"sample 0 has \d+ tokens, mini-idefics2 reads 2048. About (\d+) of 200 demonstrations fit: lower num_shots"
    with pytest.raises(InputError, match=says) as caught:
        encode(loaded, render(VQA, loaded.backbone, sample(0), [sample(1)] * 200))
    fit = int(re.search(says, str(caught.value))[1])
    assert fit > 8
    assert len(encode(loaded, render(VQA, loaded.backbone, sample(0), [sample(1)] * fit))) <= 2048


def test_generation_is_cut_at_line_end_and_stop_words():
    assert stop_strings(CAPTION, backbones.get("mini-idefics2")) == ("\n", "Caption", "Image")


@given(
    pool=st.lists(st.integers(0, 50), min_size=1, max_size=40, unique=True),
    query=st.integers(0, 50),
    k=st.integers(0, 40),
    seed=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_demos_are_never_the_query_and_never_twice(pool, query, k, seed):
    others = [i for i in pool if i != query]
    if k > len(others):
        with pytest.raises(InputError, match="num_shots"):
            draw_demos(pool, query, k, seed)
        return
    drawn = draw_demos(pool, query, k, seed)
    assert len(drawn) == len(set(drawn)) == k
    assert set(drawn) <= set(others)
    assert drawn == draw_demos(pool, query, k, seed)


def test_demos_are_the_same_on_every_machine():
    pool, recorded = list(range(100, 200)), [199, 124, 106, 151]
    assert draw_demos(pool, 7, 4, 0) == recorded
    assert draw_demos(pool, 7, 4, 0, draw=1) != recorded
    assert draw_demos(pool, 8, 4, 0) != recorded
    assert draw_demos(pool, 7, 4, 1) != recorded
    assert draw_demos(pool, "7", 4, 0) != recorded  # MME's ids are strings


def test_demos_are_drawn_evenly():
    pool = list(range(10))
    counts = [0] * 10
    for query in range(2000):
        for i in draw_demos(pool, query % 10, 3, 0, draw=query):
            counts[i] += 1
    assert max(counts) - min(counts) < 120  # 600 expected of each, standard deviation about 22


@pytest.mark.parametrize("name", ["idefics2-8b-base", "llava-interleave-7b", "qwen3-vl-8b"])
def test_the_template_that_an_adapter_keeps_is_the_prompt_it_was_trained_with(name, tmp_path):
    loaded, image = backbones.load(name, variant="tiny"), Image.new("RGB", (56, 56), "red")
    image.save(tmp_path / "0.png")
    kept = template_of(VQA, loaded.backbone)
    ours = encode_all(loaded, [render(VQA, loaded.backbone, sample(0))], root=tmp_path)[0].input_ids
    text = kept["text"].replace("{question}", "What color is the dog?")
    assert tuple(loaded.processor(text=[text], images=[[image]])["input_ids"][0]) == ours
    assert kept["stop"][0] == "\n"
