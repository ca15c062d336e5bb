"""Evaluation files as stage `evaluate` writes them, with seeds, a missing and a failed cell."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import Params

TASKS = {
    "mini-vqa": ("vqav2", "accuracy", "percent"),
    "mini-okvqa": ("okvqa", "accuracy", "percent"),
    "mini-coco": ("coco", "CIDEr", "fraction"),
}
ROWS = {
    "zero-shot": ("Zero-shot", 0.26, 0),
    "icl-8": ("8-shot ICL", 0.53, 0),
    "lora-r16": ("LoRA", 0.79, 57_344),
    "live": ("LIVE", 0.70, 516),
    "mimic": ("MimIC", 0.74, 1_040),
    "hificl": ("HiFICL", 0.81, 10_240),
}
PROVENANCE = {
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "machine": {"cpu": "a cpu", "cores": 2, "gpus": []},
    "data": {"params": "0" * 32, "outs": {}},
}


class Maker:
    """Writes evaluation files under `folder`."""

    rows = ROWS

    @staticmethod
    def params(**studies: dict[str, Any]) -> Params:
        profile = {"backbones": ["mini-idefics2"], "tasks": list(TASKS), "studies": list(studies), "data_root": "data"}
        return Params.model_validate(
            {"profile": "mini", "profiles": {"mini": profile}, "run": profile, "studies": studies}
        )

    @staticmethod
    def definition(**more: Any) -> dict[str, Any]:
        return {
            "title": "Table 1: the main comparison",
            "paper": "hificl.table1_main",
            "backbones": ["idefics2-8b-base"],
            "tasks": ["vqav2", "okvqa", "coco"],
            "methods": {row: {"method": row} for row in ROWS},
            **more,
        }

    def __init__(self, folder: Path, num_samples: int = 60) -> None:
        self.folder, self.num_samples = folder, num_samples
        (folder / "studies").mkdir(parents=True, exist_ok=True)

    def cell(
        self, row: str, task: str, seed: int, *, vary: dict[str, Any] | None = None, lift: float = 0.0, **more: Any
    ) -> dict[str, Any]:
        paper_task, metric, unit = TASKS[task]
        label, chance, size = ROWS.get(row, (row, 0.5, 0))
        name = f"{row}-{task}-{seed}-{sorted((vary or {}).items())}-{lift}"
        draw = random.Random(name)
        top = 1.6 if unit == "fraction" else 100.0
        scores = [top * (draw.random() < chance + lift) for _ in range(self.num_samples)]
        value = sum(scores) / len(scores)
        evaluation = f"e{abs(hash_of(name)):016x}"[:16]
        predictions = [{"sample_id": i, "prediction": f"word{i % 7}", "score": score} for i, score in enumerate(scores)]
        (self.folder / f"{evaluation}.json").write_text(
            json.dumps(
                {
                    "schema": 1,
                    "trial": f"t{evaluation}",
                    "config": {},
                    "evaluation": {},
                    "metric": metric,
                    "unit": unit,
                    "value": value,
                    "metrics": {metric: value},
                    "num_samples": len(scores),
                    "predictions": predictions,
                }
            )
        )
        return {
            "row": row,
            "label": label,
            "method": row,
            "backbone": "mini-idefics2",
            "paper_backbone": "idefics2-8b-base",
            "task": task,
            "paper_task": paper_task,
            "vary": vary or {},
            "seed": seed,
            "searched": {"learning_rate": 0.005} if size else {},
            "candidates": [{"trial": "a", "searched": {"learning_rate": 0.005}, "selection_score": 80.0}],
            "trial": f"t{evaluation}",
            "evaluation": evaluation,
            "metric": metric,
            "unit": unit,
            "value": value,
            "metrics": {metric: value},
            "run_id": f"{hash_of(name):032x}",
            "status": "done",
            "error": None,
            "trainable_parameters": size,
            "train_seconds": 12.1 if size else 0.0,
            "train_flops": 4.25e11 if size else None,
            "peak_memory_bytes": 3 << 28 if size else None,
            "chosen_epoch": 4 if size else None,
            "num_samples": len(scores),
            **more,
        }

    def study(self, name: str, cells: list[dict[str, Any]], **more: Any) -> Path:
        file = self.folder / "studies" / f"{name}.json"
        file.write_text(
            json.dumps(
                {
                    "schema": 1,
                    "study": name,
                    "title": f"{name}: the comparison",
                    "profile": "mini",
                    "selection": "selection",
                    "provenance": PROVENANCE,
                    "cells": cells,
                    **more,
                }
            )
        )
        return file

    def table(self, name: str = "hificl-table1", seeds: int = 3) -> list[dict[str, Any]]:
        cells = [self.cell(row, task, seed) for row in ROWS for task in TASKS for seed in range(seeds)]
        gone = {"metric": None, "unit": None, "value": None, "metrics": {}, "run_id": None, "evaluation": None}
        for cell in cells:
            if (cell["row"], cell["task"]) == ("live", "mini-coco"):
                cell.update(gone, status="missing")
            if (cell["row"], cell["task"], cell["seed"]) == ("lora-r16", "mini-vqa", 1):
                cell.update(gone, status="failed", error="the loss became NaN at step 3")
        self.study(name, cells)
        return cells


def hash_of(text: str) -> int:
    return int.from_bytes(random.Random(text).randbytes(8), "big")


@pytest.fixture(scope="session")
def new_maker() -> type[Maker]:
    return Maker


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    return Maker(tmp_path / "evaluations")
