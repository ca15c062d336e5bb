"""The documentation's gallery: each evaluated study's figure, with words, and none of before."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.report.gallery import write_gallery
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


def test_a_study_that_is_not_evaluated_here_keeps_its_picture(maker, tmp_path: Path) -> None:
    for study in ("hificl-table1", "hificl-table10"):  # one name begins with the other
        maker.table(study, seeds=1)
    tables = {study: maker.definition() for study in ("hificl-table1", "hificl-table10")}
    page = tmp_path / "docs/gallery.md"
    write_gallery(maker.params(**tables), maker.folder, page)
    whole = page.read_text()
    (maker.folder / "studies/hificl-table1.json").unlink()
    for _ in range(2):  # a second time says it no more often
        assert write_gallery(maker.params(**tables), maker.folder, page) == ["hificl-table10"]
        assert page.read_text().count("Kept from an earlier run") == 1
    assert re.findall(r"\]\((\S+)\)", page.read_text()) == re.findall(r"\]\((\S+)\)", whole)
    assert len(list((tmp_path / "docs/images/gallery").iterdir())) == 2
    maker.table("hificl-table1", seeds=1)
    assert len(write_gallery(maker.params(**tables), maker.folder, page)) == 2 and page.read_text() == whole


def test_the_gallery_of_the_documentation_has_its_pictures() -> None:
    page = ROOT / "docs/gallery.md"
    pictures = re.findall(r"!\[.+?\]\((\S+)\)", page.read_text())
    assert pictures and all((page.parent / file).is_file() for file in pictures)
