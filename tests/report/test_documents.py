"""Tables and findings that a document shows are those of the studies at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.errors import InputError
from pipeline.report.gallery import write_into


def marked(what: str, name: str, profile: str) -> str:
    return f"<!-- {what} {name} under {profile}: written by `hificl gallery` -->\noutdated\n<!-- end of {name} -->\n"


def test_marks_are_filled_again_and_again_and_the_rest_stays(maker, tmp_path: Path) -> None:
    maker.table("hificl-table1", seeds=2)
    params = maker.params(**{"hificl-table1": maker.definition()})
    document = tmp_path / "card.md"
    marks = (("study", "hificl-table1"), ("study", "hificl-table2"), ("findings", "HiFICL"))
    parts = [marked(*mark, params.profile) for mark in marks]
    document.write_text("before\n" + "between\n".join(parts) + "after\n")
    for _ in range(2):
        assert write_into(document, params, maker.folder) == 2
    text = document.read_text()
    assert text.startswith("before\n<!-- study hificl-table1") and text.endswith("after\n")
    table, other, findings = text.split("between\n")
    assert "outdated" not in table and table.count("| method |") >= 1 and "# " not in table and " ± " in table
    assert other == parts[1]  # not evaluated: as it was
    assert "In-context learning is above zero-shot" in findings and "outdated" not in findings
    assert "MimIC is above in-context learning" not in findings  # another paper's


def test_a_mark_is_filled_under_its_profile_alone(maker, tmp_path: Path) -> None:
    maker.table("hificl-table1")
    params = maker.params(**{"hificl-table1": maker.definition()})
    document = tmp_path / "card.md"
    others, own = (marked("study", "hificl-table1", name) for name in ("another", params.profile))
    document.write_text(f"{others}between\n{own}")
    assert write_into(document, params, maker.folder) == 1
    left, filled = document.read_text().split("between\n")
    assert left == others and "outdated" not in filled and "| method |" in filled


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no marks", r"card\.md: has no marks"),
        (
            marked("study", "small", "mini").replace(" under mini", ""),
            r"card\.md: a mark names no profile.*under mini: ",
        ),
    ],
)
def test_a_document_without_marks_or_with_one_of_no_profile_is_named(maker, tmp_path: Path, text, said) -> None:
    (tmp_path / "card.md").write_text(text)
    with pytest.raises(InputError, match=said):
        write_into(tmp_path / "card.md", maker.params(**{"hificl-table1": maker.definition()}), maker.folder)
    assert (tmp_path / "card.md").read_text() == text
