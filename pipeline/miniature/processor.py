"""The miniature's processors: the real classes, told to leave 32 x 32 pixels as they are."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    LlavaProcessor,
    ProcessorMixin,
    SiglipImageProcessorPil,
)

from pipeline.miniature.model import IDEFICS2, LLAVA, PATCH_SIZE, Miniature
from pipeline.miniature.render import IMAGE_SIZE

_HALF = [0.5, 0.5, 0.5]


def idefics2_processor(spec: Miniature) -> ProcessorMixin:
    """Return the processor of `mini-idefics2`; it adds `<end_of_utterance>` past the vocabulary, as the real one."""
    images = Idefics2ImageProcessorPil(
        do_resize=True,
        size={"shortest_edge": IMAGE_SIZE, "longest_edge": IMAGE_SIZE},
        do_image_splitting=False,
        image_mean=_HALF,
        image_std=_HALF,
    )
    return Idefics2Processor(images, spec.make_tokenizer(), image_seq_len=spec.visual_tokens)


def llava_processor(spec: Miniature) -> ProcessorMixin:
    """Return the processor of `mini-llava`."""
    images = SiglipImageProcessorPil(
        do_resize=True, size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=_HALF, image_std=_HALF
    )
    return LlavaProcessor(images, spec.make_tokenizer(), patch_size=PATCH_SIZE, vision_feature_select_strategy="full")


_MAKERS = {IDEFICS2.name: idefics2_processor, LLAVA.name: llava_processor}


def save_processor(spec: Miniature, folder: Path) -> None:
    """Write processor and tokenizer files to `folder`.

    The tokenizer is written last and by itself: making an Idefics2 processor adds `<end_of_utterance>` to
    its tokenizer, past the embedding, and the checkpoint of a base model does not have it.
    """
    _MAKERS[spec.name](spec).save_pretrained(folder)
    spec.make_tokenizer().save_pretrained(folder)
