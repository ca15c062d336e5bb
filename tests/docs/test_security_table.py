"""Each sentence of the security table in docs/cluster.md has tests, and they are there."""

from __future__ import annotations

import re

from tests.conftest import ROOT


def test_each_row_names_tests_that_there_are():
    text = (ROOT / "docs/cluster.md").read_text(encoding="utf-8").partition("## Security")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*) \| (.*) \|$", text, re.MULTILINE)[1:]
    assert len(rows) > 10
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    there = set(re.findall(r"^def (test_\w+)", written, re.MULTILINE))
    for sentence, tests in rows:
        named = re.findall(r"`(test_\w+)`", tests)
        assert named and set(named) <= there, sentence
