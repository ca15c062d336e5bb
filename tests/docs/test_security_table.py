"""Each sentence of the security tables has tests, and they are there."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(("page", "least"), [("cluster.md", 11), ("serving.md", 4)])
def test_each_row_names_tests_that_there_are(page, least):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").partition("## Security")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*) \| (.*) \|$", text, re.MULTILINE)[1:]
    assert len(rows) >= least
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    there = set(re.findall(r"^def (test_\w+)", written, re.MULTILINE))
    for sentence, tests in rows:
        named = re.findall(r"`(test_\w+)`", tests)
        assert named and set(named) <= there, sentence
