"""Small made-up VQAv2, OK-VQA and COCO in the official formats: `python -m tests.support.official_files FOLDER`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from benchmarks.support.synthetic import SyntheticSize, write_images, write_vqav2

SUBSETS = {"train2014": (1, 40), "val2014": (1001, 20)}  # first image, number of images


def write(root: Path) -> None:
    """Write annotations and pictures of the three tasks below `root`."""
    for subset, (first, count) in SUBSETS.items():
        made = write_vqav2(root, subset, SyntheticSize(num_questions=count, num_images=count), first_image=first)
        (root / "okvqa").mkdir(exist_ok=True)
        for path in made:  # OK-VQA's files differ in their names alone
            shutil.copy(path, root / "okvqa" / path.name.removeprefix("v2_"))
        names = {first + i: f"COCO_{subset}_{first + i:012d}.jpg" for i in range(count)}
        write_images(root, [f"coco/{subset}/{name}" for name in names.values()], width=96, height=64)
        images = [{"id": number, "file_name": name, "height": 64, "width": 96} for number, name in names.items()]
        captions = [
            {"id": 10 * number + i, "image_id": number, "caption": f"A {what} stands on a road number {number}."}
            for number in names
            for i, what in enumerate(("dog", "brown dog", "small animal", "pet", "dog with a ball"))
        ]
        (root / "coco/annotations").mkdir(exist_ok=True)
        file = root / f"coco/annotations/captions_{subset}.json"
        file.write_text(json.dumps({"info": {}, "licenses": [], "images": images, "annotations": captions}))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
