"""The documentation's gallery: each evaluated study's figure, with words, and none of before."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.report.pictures import write_gallery
from tests.conftest import ROOT


def test_each_study_is_shown_with_its_words(maker, tmp_path: Path) -> None:
    maker.table("hificl-table1", seeds=1)
    page = tmp_path / "docs/gallery.md"
    (tmp_path / "docs/images/gallery").mkdir(parents=True)
    stale = tmp_path / "docs/images/gallery/gone.svg"
    stale.write_text("<svg/>")
    assert write_gallery(maker.params(**{"hificl-table1": maker.definition()}), maker.folder, page) == ["hificl-table1"]
    pictures = re.findall(r"!\[(.+?)\]\((\S+)\)", page.read_text())
    assert len(pictures) == 1 and not stale.exists()
    words, file = pictures[0]
    assert len(words) > 20 and (page.parent / file).read_text().startswith("<svg")


def test_the_gallery_of_the_documentation_has_its_pictures() -> None:
    page = ROOT / "docs/gallery.md"
    pictures = re.findall(r"!\[.+?\]\((\S+)\)", page.read_text())
    assert pictures and all((page.parent / file).is_file() for file in pictures)
