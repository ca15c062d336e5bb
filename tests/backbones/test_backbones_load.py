"""Every registered backbone: its real configuration counted, its tiny variant built, its published layout read back."""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pipeline import backbones
from pipeline.backbones import base, weights
from pipeline.backbones.weights import digest_of_file
from pipeline.config.load import BackboneSource
from pipeline.core.errors import InputError
from tests.conftest import ROOT

PUBLISHED = json.loads((ROOT / "tests/golden/published_configs.json").read_text(encoding="utf-8"))
MINIATURES = [name for name in backbones.names() if backbones.get(name).hub_id is None]


@pytest.mark.parametrize("name", backbones.names())
def test_real_configuration_has_the_published_parameters(name):
    loaded = backbones.load(name, variant="meta")
    assert sum(p.numel() for p in loaded.model.parameters()) == loaded.backbone.parameters
    assert all(p.is_meta and not p.requires_grad for p in loaded.model.parameters())
    for part in (loaded.backbone.modules.vision, *loaded.backbone.modules.connector):
        loaded.model.get_submodule(part)


# transformers takes these along from a published file or a default, and no model or processor reads them
UNREAD = {
    "ignore_index", "use_image_newline_parameter", "cross_layer_activation_function", "max_sequence_length",
    "image_seq_length", "perceiver_config.use_resampler", "vision_config.vocab_size", "text_config.tie_word_embeddings",
}  # fmt: skip
TINY_DIGESTS = {  # they name trials of before
    "idefics-9b": "f63b697ae17bd761",
    "idefics2-8b-base": "14444c76643225b6",
    "llava-interleave-7b": "5ab9fc5aee7eadf5",
    "llava-onevision-qwen2-7b": "7f5fa4c2ab60e60b",
    "llava-v1.6-mistral-7b": "7d2bc14b468fd9c0",
    "mini-idefics2": "5b75640be46a2dd9",
    "mini-llava": "edaf02d610501d7d",
    "qwen3-vl-8b": "596041aa52bb7410",
}


def flat(config, prefix=""):
    """Return a configuration's values by dotted name."""
    rows = {}
    for key, value in config.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return rows


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_real_configuration_is_what_transformers_makes_of_the_published_file(name):
    facts = backbones.get(name)
    published = flat(facts.family.config_class(**PUBLISHED[name]).to_dict())
    ours = flat(facts.family.build_config(facts.config).to_dict())
    different = {key for key in {*published, *ours} if published.get(key) != ours.get(key)}
    assert different <= UNREAD | ({"vocab_size"} if name == "llava-v1.6-mistral-7b" else set())


@pytest.mark.parametrize("name", backbones.names())
def test_tiny_variants_keep_the_digest_that_names_their_trials(name):
    assert backbones.digest_of(name, BackboneSource(variant="tiny")).startswith(TINY_DIGESTS[name])


@pytest.mark.parametrize("name", backbones.names())
def test_tiny_is_decided_by_its_seed(name, tiny):
    first = tiny(name)
    again = backbones.load(name, variant="tiny")
    other = backbones.load(name, variant="tiny", seed=1)
    assert first.digest == again.digest != other.digest
    same = zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    differ = zip(first.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    assert any(not torch.equal(a, b) for a, b in differ)
    assert first.tokenizer.get_vocab() == again.tokenizer.get_vocab()
    assert not first.model.training and not any(p.requires_grad for p in first.model.parameters())
    assert sum(p.numel() for p in first.model.parameters()) < 3_000_000
    assert "Pil" in type(first.processor.image_processor).__name__


@pytest.mark.parametrize("name", backbones.names())
def test_loading_leaves_the_global_random_state_alone(name):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    backbones.load(name, variant="tiny")
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture(scope="module")
def published(tmp_path_factory, tiny):
    """Tiny weights in the published layout, by name."""
    made = {}

    def folder(name, **options):
        if (name, *options) not in made:
            path = tmp_path_factory.mktemp("published") / name
            tiny(name).model.save_pretrained(path, **options)
            tiny(name).processor.save_pretrained(path)
            made[name, *options] = path
        return made[name, *options]

    return folder


@pytest.mark.parametrize("name", backbones.names())
def test_published_layout_gives_the_same_model(name, tiny, published):
    folder = published(name)
    loaded = backbones.load(name, weights=folder)
    reference = tiny(name)
    assert loaded.folder == folder
    assert type(loaded.processor.image_processor) is type(reference.processor.image_processor)
    for key, value in reference.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value), key
    text = "Image: Question: What color is the dog? Answer: red\n"
    assert loaded.tokenizer(text).input_ids == reference.tokenizer(text).input_ids
    assert loaded.never_generated == reference.never_generated
    assert loaded.eos_token_ids == reference.eos_token_ids


def test_sharded_weights_and_their_digest(tiny, published, tmp_path):
    name = "idefics2-8b-base"
    folder = published(name, max_shard_size="200KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    loaded = backbones.load(name, weights=folder)
    assert all(
        torch.equal(loaded.model.state_dict()[key], value) for key, value in tiny(name).model.state_dict().items()
    )
    assert loaded.digest == backbones.digest_of(name, BackboneSource(weights=str(folder)))
    data = bytearray(shards[0].read_bytes())
    data[-1] ^= 1
    shards[0].write_bytes(data)
    assert backbones.digest_of(name, BackboneSource(weights=str(folder))) != loaded.digest
    shards[1].unlink()
    with pytest.raises(InputError, match=r"1 of \d+ weight files are missing"):
        backbones.load(name, weights=folder)


@pytest.mark.parametrize("name", backbones.names())
def test_digest_is_known_without_loading(name, tiny):
    assert backbones.digest_of(name, BackboneSource(variant="tiny")) == tiny(name).digest


def test_missing_weights_say_what_to_download(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="HuggingFaceM4/idefics2-8b-base.*params.yaml"):
        backbones.load("idefics2-8b-base", weights=tmp_path / "nowhere")
    with pytest.raises(InputError, match="hf download llava-hf/llava-interleave-qwen-7b-hf"):
        backbones.load("llava-interleave-7b", revision="0" * 40)


def damaged_config(folder):
    (folder / "config.json").write_text("{")


def other_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lost_parameters(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damaged_config, "no valid JSON"),
        (other_model, "model_type is 'gpt2'"),
        (cut_weights, "cannot be loaded"),
        (only_pickles, "pickled"),
        (lost_parameters, "1 parameters of llava-interleave-7b are not in the weights"),
    ],
)
def test_bad_weights_are_refused(harm, message, tiny, tmp_path):
    loaded = tiny("llava-interleave-7b")
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    harm(tmp_path)
    with pytest.raises(InputError, match=message):
        backbones.load("llava-interleave-7b", weights=tmp_path)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'idefics2-8b-base'"):
        backbones.load("idefics2-8b-bse")
    with pytest.raises(InputError, match="Did you mean 'tiny'"):
        backbones.load("idefics2-8b-base", variant="tyny")
    with pytest.raises(InputError, match="bf16"):
        backbones.load("idefics2-8b-base", variant="tiny", dtype="float8")


def test_big_files_are_hashed_once(tmp_path, monkeypatch):
    import hashlib

    from pipeline.backbones import weights

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "_BIG", 4)
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"weights")
    first = digest_of_file(path)
    assert first == hashlib.sha256(b"weights").hexdigest()
    note = next(path for path in (tmp_path / "cache").rglob("sha256/*") if not path.suffix)  # beside it, its lock
    note.write_text("0" * 64)  # what is remembered is what is answered
    assert digest_of_file(path) == "0" * 64
    path.write_bytes(b"changed")
    assert digest_of_file(path) == hashlib.sha256(b"changed").hexdigest()


def test_hub_cache_names_are_digests(tmp_path):
    blob = tmp_path / ("ab" * 32)
    blob.write_bytes(b"x")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert digest_of_file(link) == "ab" * 32


@pytest.mark.parametrize("name", MINIATURES)
def test_miniature_facts_are_those_of_its_checkpoints(name):
    from pipeline.miniature.model import SMALL, miniature

    spec = miniature(name)
    made = spec.make_config(spec.make_tokenizer(), SMALL).to_dict()
    facts = backbones.get(name)
    ours = facts.family.build_config(facts.config).to_dict()
    for section in ("text_config", "vision_config", "perceiver_config"):
        if section in made:
            assert ours[section] == made[section]
    tokenizer = spec.make_tokenizer()
    assert {tokenizer.convert_tokens_to_ids(text) for text in facts.special_tokens.values()}.isdisjoint({None})
    assert facts.config.get("image_token_id", facts.config.get("image_token_index")) == (
        tokenizer.convert_tokens_to_ids(facts.image_token)
    )


def test_processes_that_start_together_hash_a_big_file_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "_BIG", 10)
    file, hashed = tmp_path / "model.safetensors", []
    file.write_bytes(b"w" * 1000)

    def slowly(stream, name):
        hashed.append(name)
        time.sleep(0.2)
        return hashlib.new(name, stream.read())

    monkeypatch.setattr(hashlib, "file_digest", slowly)
    with ThreadPoolExecutor(4) as threads:  # flock holds between open files, in one process as between several
        found = set(threads.map(weights.digest_of_file, [file] * 4))
    assert found == {hashlib.sha256(b"w" * 1000).hexdigest()} and hashed == ["sha256"]


def test_weights_go_straight_to_a_card(monkeypatch):
    """There is none here: what transformers is asked for is looked at, and given without it."""
    family, asked = backbones.get("mini-idefics2").family, []
    plain = family.model_class.from_pretrained

    def loading(*args, **kwargs):
        asked.append(kwargs.pop("device_map", None))
        return plain(*args, **kwargs)

    monkeypatch.setattr(family.model_class, "from_pretrained", loading)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: self)
    folder = ROOT / "checkpoints" / "mini-idefics2"
    for device in ("cpu", "cuda"):
        backbones.load("mini-idefics2", weights=folder, device=device)
    assert asked == [None, {"": torch.device("cuda")}]


def test_a_transformers_that_drops_visual_tokens_is_refused(monkeypatch):
    from transformers.generation import utils

    check = base._check_takes_visual_tokens
    check.cache_clear()
    check()
    check.cache_clear()
    monkeypatch.delattr(utils.GenerationMixin, "_supports_mm_encoder_outputs")
    arguments = {"pixels": None, "input_ids": torch.zeros(1, 1), "image_counts": [1], "image_token_id": 0}
    with pytest.raises(InputError, match=r"no visual tokens .* requirements\.txt"):
        backbones.get("llava-interleave-7b").family.image_arguments(visual=[torch.zeros(1, 1)], **arguments)


def test_too_little_memory_is_no_fault_of_the_weights(monkeypatch):
    """A worker's error then, which another process may not have; bad weights are the input's."""
    family, folder = backbones.get("mini-idefics2").family, ROOT / "checkpoints" / "mini-idefics2"
    for said, kind in (
        ("libx.so: failed to map segment from shared object", OSError),
        ("[Errno 12] Cannot allocate memory", OSError),
        ("no such layout", InputError),
    ):

        def loading(*args, said=said, **kwargs):
            raise OSError(said)

        monkeypatch.setattr(family.model_class, "from_pretrained", loading)
        with pytest.raises(kind):
            backbones.load("mini-idefics2", weights=folder)
