"""A sheet of the miniature world's pictures, with what is asked and written about each."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image as mpimg
from matplotlib.figure import Figure

COLUMNS, ROWS = 4, 2


def draw_world(world: Path, out: Path) -> Path:
    """Write the first pictures of a world (`write_world`) with their questions, answers and captions as PNG.

    Args:
        world: its folder.
        out: the file.
    """

    def read(name: str, part: str) -> dict[int, dict]:
        entries = json.loads((world / name).read_text(encoding="utf-8"))[part]
        first: dict[int, dict] = {}
        for entry in entries:
            first.setdefault(entry["image_id"], entry)
        return first

    asked = read("v2_OpenEnded_mscoco_train2014_questions.json", "questions")
    answered = read("v2_mscoco_train2014_annotations.json", "annotations")
    captions = read("annotations/captions_train2014.json", "annotations")
    figure = Figure(figsize=(9.5, 6.2), layout="constrained")
    panels = figure.subplots(ROWS, COLUMNS).flatten()
    for panel, image in zip(panels, sorted(asked), strict=False):
        panel.imshow(mpimg.imread(world / f"train2014/COCO_train2014_{image:012d}.png"), interpolation="nearest")
        panel.set_axis_off()
        words = captions[image]["caption"].split()
        half = (len(words) + 1) // 2
        caption = " ".join(words[:half]) + "\n" + " ".join(words[half:])
        answer = answered[image]["multiple_choice_answer"]
        panel.set_title(f"{asked[image]['question']} {answer}\n{caption}", fontsize=7.5)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Software": None})
    return out
