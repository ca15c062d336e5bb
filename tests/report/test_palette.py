"""A method's colour: its own, the same everywhere, and told apart by readers who see no red or no green."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from pipeline import methods
from pipeline.report import load_table, papers
from pipeline.report.drawing import MARKERS, looks, of_method

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
SIGHTS = {
    "whole": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}
TO_LMS = [[0.4122215, 0.5363325, 0.0514460], [0.2119035, 0.6806995, 0.1073970], [0.0883025, 0.2817188, 0.6299787]]
TO_LAB = [[0.2104543, 0.7936178, -0.0040720], [1.9779985, -2.4285922, 0.4505937], [0.0259040, 0.7827718, -0.8086758]]


def seen(colour: str, sight: str) -> np.ndarray:
    """A colour in OKLab as that eye sees it; 0.02 is about what one just notices."""
    part = np.array(to_rgb(colour))
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return np.array(TO_LAB) @ np.cbrt(np.array(TO_LMS) @ np.clip(np.array(SIGHTS[sight]) @ linear, 0, 1))


def test_every_method_has_a_colour_and_a_marker_of_its_own() -> None:
    known = [papers.method_look(name) for name in methods.names()]
    assert None not in known
    assert len({look.colour for look in known if look}) == len({look.marker for look in known if look}) == len(known)


@pytest.mark.parametrize("sight", SIGHTS)
def test_colours_are_told_apart(sight: str) -> None:
    for one, other in itertools.combinations(methods.names(), 2):
        apart = np.linalg.norm(seen(of_method(one)[0], sight) - seen(of_method(other)[0], sight))
        assert apart > 0.05, (one, other, sight, apart)


def test_a_new_method_has_a_look_that_follows_from_its_name() -> None:
    found = {of_method(f"new-{number}") for number in range(50)}
    assert len(found) > 45
    assert all(marker in MARKERS and np.isfinite(to_rgb(colour)).all() for colour, marker in found)


def test_a_methods_rows_are_shades_and_the_reference_row_has_the_colour_itself(maker: Any) -> None:
    rows = {"with-teacher": "hificl", "icl-8": "icl-k", "icl-16": "icl-k", "hificl": "hificl", "none": "zero-shot"}
    cells = [maker.cell(row, "mini-vqa", 0) | {"method": method} for row, method in rows.items()]
    maker.study("hificl-table2", cells)
    table = load_table("hificl-table2", maker.params(**{"hificl-table2": maker.definition(paper=None)}), maker.folder)
    assert table.reference == "hificl"
    found = looks(table, lambda line: line.row)
    assert len({(look.colour, look.marker) for look in found.values()}) == len(rows)
    for row, method in (("hificl", "hificl"), ("icl-8", "icl-k"), ("none", "zero-shot")):
        assert (found[row].colour, found[row].marker) == of_method(method)
    assert found["with-teacher"].marker == found["hificl"].marker
    assert found["with-teacher"].dash != found["hificl"].dash


def test_twelve_rows_of_a_method_are_twelve_markers(maker: Any) -> None:
    cells = [maker.cell(f"lora-{rank}", "mini-vqa", 0) | {"method": "lora"} for rank in range(12)]
    maker.study("hificl-table2", cells)
    table = load_table("hificl-table2", maker.params(**{"hificl-table2": maker.definition(paper=None)}), maker.folder)
    found = looks(table, lambda line: line.row).values()
    assert len({(look.colour, look.marker, look.fill) for look in found}) == 12


def test_rows_that_share_no_backbone_share_the_colour(maker: Any) -> None:
    other = {"backbone": "mini-llava", "paper_backbone": "idefics-9b"}
    cells = [maker.cell("mimic", "mini-vqa", 0), maker.cell("lora-r16", "mini-vqa", 0) | {"method": "lora"}]
    cells += [maker.cell("mimic-32", "mini-vqa", 0) | {"method": "mimic"} | other]
    cells += [maker.cell("mimic-64", "mini-vqa", 0) | {"method": "mimic"} | other]
    maker.study("mimic-main", cells)
    table = load_table("mimic-main", maker.params(**{"mimic-main": maker.definition(paper="mimic.main")}), maker.folder)
    found = looks(table, lambda line: line.row)
    assert found["mimic"] == found["mimic-32"] != found["mimic-64"]
