"""Visual tokens computed once: equal to the bit to the pixels' way, bounded, shared, and robust against damage."""

from __future__ import annotations

import os
import resource
import shutil
import threading
from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from safetensors.torch import save

from pipeline import backbones
from pipeline.core.errors import InputError
from pipeline.data.sample import ImageRef, Sample
from pipeline.prompts.collate import collate
from pipeline.prompts.prompt import encode_all, render
from pipeline.resident.visual_tokens import DiskStore, VisualTokens
from pipeline.tasks import PromptTemplate

TEMPLATE = PromptTemplate("", False, "Image: {image} Question: {question} Answer:", " {answer}\n", ("Question",))


@pytest.fixture(params=backbones.names())
def loaded(request, tiny):
    return tiny(request.param)


def two_rows(loaded):
    """Two rows of one image each, both of one size: the same batch reaches the vision tower on both ways."""
    samples = [Sample("vqav2", i, (ImageRef(f"{i}.png"),), "What?" + " Why?" * i, "yes", ()) for i in range(2)]
    rendered = [render(TEMPLATE, loaded.backbone, s, answer=True) for s in samples]
    return encode_all(loaded, rendered, image_sizes=[[(56, 56)]] * 2)


@torch.no_grad()
def test_reuse_gives_the_same_logits_to_the_bit(loaded, pictures):
    visual = VisualTokens(loaded)
    rows = two_rows(loaded)
    pixels = collate(rows, loaded, pixels=visual.pixels([e.images for e in rows], pictures))
    reused = collate(rows, loaded, visual=visual.get([i for e in rows for i in e.images], pictures))
    calls = []
    tower = loaded.model.get_submodule(loaded.backbone.modules.vision)
    hook = tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        first = loaded.model(**pixels.model_inputs(loaded)).logits
        assert calls
        calls.clear()
        second = loaded.model(**reused.model_inputs(loaded)).logits
        assert not calls
    finally:
        hook.remove()
    assert torch.equal(first, second)
    # and the images matter
    other = collate(rows, loaded, visual=visual.get(["5.png", "6.png"], pictures))
    if [v.shape for v in other.visual] == [v.shape for v in reused.visual]:
        assert not torch.allclose(loaded.model(**other.model_inputs(loaded)).logits, first)


SIZES = [(1, 1), (1, 50), (50, 1), (3, 200), (200, 3), (3, 3), (1, 200), (1, 201), (1000, 1), (10, 2500), (2500, 10)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_thin_and_tiny_pictures_are_read_or_refused_by_name(loaded, width, height, tmp_path):
    """The text has a place for each visual token of the picture; or both ways name the file, its size and the rule."""
    noise = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    PIL.Image.fromarray(noise.numpy()).save(tmp_path / "thin.png")
    sample = Sample("vqav2", 0, (ImageRef("thin.png"),), "What?", "", ())
    rendered = [render(TEMPLATE, loaded.backbone, sample)]
    thin = max(width, height) > 200 * min(width, height)
    if loaded.family.model_type == "qwen3_vl" and thin:
        says = rf"thin\.png: {width} x {height} pixels: Qwen3-VL reads no picture more than 200 times as wide as high"
        with pytest.raises(InputError, match=says):
            encode_all(loaded, rendered, root=tmp_path)
        with pytest.raises(InputError, match=says):
            VisualTokens(loaded).get(["thin.png"], tmp_path)
        with pytest.raises(ValueError, match="aspect ratio"):  # the rule is the processor's own
            loaded.family.process(loaded.processor, PIL.Image.open(tmp_path / "thin.png"))
        return
    (prompt,) = encode_all(loaded, rendered, root=tmp_path)
    (tokens,) = VisualTokens(loaded).get(["thin.png"], tmp_path)
    places = prompt.input_ids.count(loaded.image_token_id)
    assert places == (1 if loaded.family.model_type == "idefics" else tokens[..., 0].numel())


def test_a_strip_that_would_be_padded_to_a_huge_square_is_refused(tiny, tmp_path):
    PIL.Image.new("RGB", (60_000, 1)).save(tmp_path / "strip.png")  # 60,000 x 60,000: 10 GB
    with pytest.raises(InputError, match=r"strip\.png: 60000 x 1 pixels: LLaVA-OneVision pads a picture to a square"):
        VisualTokens(tiny("llava-onevision-qwen2-7b")).get(["strip.png"], tmp_path)


@torch.no_grad()
def test_generation_reuses_to_the_token(loaded, pictures):
    visual = VisualTokens(loaded)
    rows = two_rows(loaded)
    pixels = collate(rows, loaded, side="left", pixels=visual.pixels([e.images for e in rows], pictures))
    reused = collate(rows, loaded, side="left", visual=visual.get([i for e in rows for i in e.images], pictures))
    for beams in (1, 2):
        options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
        first = loaded.model.generate(**pixels.model_inputs(loaded), **options)
        second = loaded.model.generate(**reused.model_inputs(loaded), **options)
        assert torch.equal(first, second)


def test_each_picture_goes_through_the_tower_once(tiny, pictures, tmp_path):
    loaded = tiny("idefics2-8b-base")
    shutil.copy(pictures / "0.png", tmp_path / "same.png")
    visual = VisualTokens(loaded, tmp_path / "cache", batch_size=2)
    paths = [pictures / f"{i}.png" for i in (0, 1, 2, 3, 4, 7)]
    first = visual.get([*paths, tmp_path / "same.png", paths[0]])
    assert visual.computed == 6
    assert torch.equal(first[0], first[6]) and torch.equal(first[0], first[7])
    assert all(tokens.shape == (4, 64) for tokens in first)
    visual.get(paths)
    visual.prefetch(paths)
    assert visual.computed == 6
    other_process = VisualTokens(loaded, tmp_path / "cache")
    again = other_process.get(paths)
    assert other_process.computed == 0
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    other_weights = VisualTokens(backbones.load("idefics2-8b-base", variant="tiny", seed=1), tmp_path / "cache")
    assert not torch.equal(other_weights.get(paths[:1])[0], first[0])
    assert other_weights.computed == 1


def test_neighbours_of_other_sizes_change_nothing(tiny, pictures):
    loaded = tiny("idefics2-8b-base")
    together = VisualTokens(loaded).get([f"{i}.png" for i in range(7)], pictures)
    for i, tokens in enumerate(together):
        torch.testing.assert_close(VisualTokens(loaded).get([f"{i}.png"], pictures)[0], tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "garbage"])
def test_a_damaged_entry_is_computed_again(harm, tiny, pictures, tmp_path):
    loaded = tiny("llava-interleave-7b")
    visual = VisualTokens(loaded, tmp_path)
    expected = visual.get(["0.png"], pictures)[0]
    [entry] = tmp_path.rglob("*.safetensors")
    data = bytearray(entry.read_bytes())
    data[-3] ^= 0xFF
    entry.write_bytes({"cut": data[:-10], "flip": data, "empty": b"", "garbage": b"x" * 500}[harm])
    again = VisualTokens(loaded, tmp_path)
    assert torch.equal(again.get(["0.png"], pictures)[0], expected)
    assert again.computed == 1
    once_more = VisualTokens(loaded, tmp_path)
    assert torch.equal(once_more.get(["0.png"], pictures)[0], expected)
    assert once_more.computed == 0


def test_an_error_of_the_system_costs_time_and_removes_nothing(tmp_path, monkeypatch):
    """Too many open files; another user's file, whose time may not be set; a disk that can only be read."""
    store = DiskStore(tmp_path, limit=1 << 20)
    store.write("ab", torch.arange(8.0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(tmp_path, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        assert store.read("ab") is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert store.path("ab").exists()

    def refused(*_args, **_names):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refused)
    assert torch.equal(store.read("ab"), torch.arange(8.0)) and store.path("ab").exists()


def test_the_disk_stays_below_its_limit(tmp_path):
    size = len(_entry_bytes(tmp_path / "probe"))
    store = DiskStore(tmp_path / "store", limit=10 * size)
    for i in range(30):
        store.write(f"{i:02d}", torch.full((8, 8), float(i)))
        if i > 2:
            assert store.read("02") is not None  # in use, therefore kept
    files = list((tmp_path / "store").rglob("*.safetensors"))
    assert 8 <= len(files) <= 10
    assert store.read("29") is not None and store.read("05") is None


def _entry_bytes(folder):
    store = DiskStore(folder, limit=1 << 20)
    store.write("00", torch.zeros(8, 8))
    return store.path("00").read_bytes()


def test_several_writers_of_one_key(tmp_path):
    stores = [DiskStore(tmp_path, limit=1 << 20) for _ in range(4)]
    tensor = torch.arange(1000.0)
    seen = []

    def work(store):
        for _ in range(25):
            store.write("ab", tensor)
            seen.append(store.read("ab"))

    threads = [threading.Thread(target=work, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 100 and all(torch.equal(found, tensor) for found in seen)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["ab.safetensors"]


def test_a_folder_that_cannot_be_written_costs_time_only(tiny, pictures, tmp_path):
    (tmp_path / "file").write_text("")
    visual = VisualTokens(tiny("llava-interleave-7b"), tmp_path / "file")
    assert visual.get(["0.png"], pictures)[0].shape == (16, 64)


def test_memory_is_bounded(tiny, pictures):
    loaded = tiny("llava-interleave-7b")
    visual = VisualTokens(loaded, memory_bytes=3 * 16 * 64 * 4)
    names = [f"{i}.png" for i in range(7)]
    first = visual.get(names, pictures)
    assert visual.computed == 7 and len(first) == 7
    visual.get(names[-3:], pictures)
    assert visual.computed == 7
    visual.get(names[:1], pictures)
    assert visual.computed == 8


def test_half_precision_is_kept(tiny, pictures, tmp_path):
    loaded = backbones.load("llava-interleave-7b", variant="tiny", dtype="bf16")
    first = VisualTokens(loaded, tmp_path).get(["0.png"], pictures)[0]
    again = VisualTokens(loaded, tmp_path)
    assert first.dtype == torch.bfloat16
    assert torch.equal(again.get(["0.png"], pictures)[0], first) and again.computed == 0
    assert VisualTokens(tiny("llava-interleave-7b"), tmp_path).get(["0.png"], pictures)[0].dtype == torch.float32


def test_missing_and_broken_pictures_are_named(tiny, tmp_path):
    visual = VisualTokens(tiny("llava-interleave-7b"))
    with pytest.raises(InputError, match=r"nowhere\.png"):
        visual.get(["nowhere.png"], tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match=r"text\.png"):
        visual.get(["text.png"], tmp_path)


def test_stores_share_the_room_that_the_disk_has(tmp_path, monkeypatch):
    size = len(save({"tokens": torch.zeros(1000)}, metadata={"crc32": "1" * 10}))
    taken = lambda: sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))  # noqa: E731
    disk = 25 * size  # of which the stores may have four fifths
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=disk - taken()))
    for name in ("first", "second"):
        store = DiskStore(tmp_path / name, None, tmp_path)
        for number in range(18):
            store.write(f"{number:02d}{name}", torch.full((1000,), float(number)))
            os.utime(store.path(f"{number:02d}{name}"), (number, number + 100 * (name == "second")))
        assert taken() <= 0.8 * disk
    assert len(list((tmp_path / "second").rglob("*.safetensors"))) == 18  # the first backbone's make way


def test_pictures_made_ready_ahead_are_the_same_and_forgotten(tiny, pictures, monkeypatch):
    loaded = tiny("idefics2-8b-base")
    images = [ImageRef(f"{i}.png") for i in range(7)]
    plain, ahead = VisualTokens(loaded), VisualTokens(loaded, threads=2)
    assert plain._threads is None  # on a CPU they would take the model's own time
    names, decoded = set(), VisualTokens._decoded

    def noted(self, data, place):
        names.add(threading.current_thread().name.split("_")[0])
        return decoded(self, data, place)

    monkeypatch.setattr(VisualTokens, "_decoded", noted)
    wanted = plain.get(images, pictures)
    assert names == {threading.current_thread().name.split("_")[0]}
    names.clear()
    ahead.ahead(images[:3], pictures)
    assert len(ahead._underway) == 3
    made = ahead.get(images, pictures)
    assert names == {"pictures"} and not ahead._underway
    assert all(torch.equal(x, y) for x, y in zip(made, wanted, strict=True))
    ahead.ahead(images, pictures)  # they are at hand
    assert not ahead._underway
    ahead.ahead(images, pictures, pixels=True)
    rows = [images[:2], images[2:3]]
    for name, value in plain.pixels(rows, pictures).items():
        assert torch.equal(ahead.pixels(rows, pictures)[name], value)
    ahead.forget_ahead()
    assert not ahead._underway
