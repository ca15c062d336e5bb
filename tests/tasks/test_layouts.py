"""Wherever a task's pictures lie, in folders or in cells of shards, every backbone reads them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipeline import backbones, tasks
from pipeline.data.image_files import image_digest, open_image, read_image, sizes
from pipeline.lineage.run_record import SAME, Checks
from pipeline.lineage.trace import _Walk
from pipeline.prompts.collate import collate
from pipeline.prompts.prompt import encode_all, render
from pipeline.resident.visual_tokens import VisualTokens
from pipeline.sweep.draw import draw_manifest
from tests.tasks.conftest import LAYOUTS


@pytest.fixture(scope="module", params=LAYOUTS)
def drawn(request, tmp_path_factory):
    """The manifest of a layout."""
    name, make = LAYOUTS[request.param]
    root = make(tmp_path_factory.mktemp("layout"))
    return draw_manifest(tasks.get(name), root, seed=0, num_train=4, num_selection=2, num_evaluation=2)


def test_every_task_has_its_layouts():
    assert {name for name, _ in LAYOUTS.values()} == {n for n in tasks.names() if tasks.get(n).stands_for == n}


@pytest.mark.parametrize("name", backbones.names())
def test_every_backbone_reads_every_layout(drawn, name, tiny):
    loaded, task = tiny(name), tasks.get(drawn.task)
    query, demonstration = drawn.splits["evaluation"][0], drawn.splits["train"][0]
    prompts = encode_all(
        loaded,
        [render(task.template, loaded.backbone, query, [demonstration], answer=True, style=drawn.prompt)],
        root=drawn.image_root,
    )
    visual = VisualTokens(loaded).get(list(prompts[0].images), drawn.image_root)
    places = prompts[0].input_ids.count(loaded.image_token_id)
    tokens = len(visual) if name == "idefics-9b" else sum(image[..., 0].numel() for image in visual)
    assert places == tokens > 0
    with torch.no_grad():
        logits = loaded.model(**collate(prompts, loaded, visual=visual).model_inputs(loaded)).logits
    assert torch.isfinite(logits).all()


def test_bytes_digest_and_size_are_those_of_the_draw(drawn):
    for samples in drawn.splits.values():
        for image in (image for sample in samples for image in sample.images):
            picture = open_image(drawn.image_root / image.path)
            assert sizes([image], drawn.image_root)[0] == (picture.height, picture.width)
            assert sizes([image.path], drawn.image_root)[0] == (picture.height, picture.width)
            assert image_digest(image.path, drawn.image_root) == image.sha256
            assert read_image(image, drawn.image_root) == read_image(image.path, drawn.image_root)


def test_a_trace_finds_the_pictures_where_they_lie(drawn):
    walk = SimpleNamespace(checks=Checks())
    images = {i.path: i.sha256 for samples in drawn.splits.values() for one in samples for i in one.images}
    _Walk._images(walk, drawn.image_root, images)
    assert [check.state for check in walk.checks.made] == [SAME]
