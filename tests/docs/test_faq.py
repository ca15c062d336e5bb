"""The errors that docs/faq.md shows are those that its commands print."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT
from tests.docs.situations import SITUATIONS

pytestmark = pytest.mark.e2e
TEXT = (ROOT / "docs/faq.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- with: ([\w-]+) -->\n```console\n(.*?)```", TEXT, re.DOTALL)
SHOWN = [
    (situation, command, " ".join(message.split()))
    for situation, block in BLOCKS
    for command, message in re.findall(r"^\$ hificl (.+)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
]


def pattern(message: str) -> str:
    """`...` stands for what differs from machine to machine: paths, digests, process ids."""
    return ".*".join(re.escape(part) for part in message.split("..."))


@pytest.mark.parametrize(("situation", "command", "message"), SHOWN, ids=[f"{s}: {c}" for s, c, _ in SHOWN])
def test_the_message_is_the_real_one(reader, situation, command, message):
    for shown, own in reader.names.items():
        message = re.sub(shown, own, message)
    with SITUATIONS[situation](reader.project.folder):
        status, _, err = reader.hificl(reader.words(command))
    line = err.strip().splitlines()[-1]
    assert re.fullmatch(pattern(message), line), f"\n{line}\nis not what the page says:\n{message}"
    assert status in (1, 2) and "Traceback" not in err


def test_every_block_of_the_page_says_its_situation():
    assert len(BLOCKS) == TEXT.count("```console") and len(SHOWN) == TEXT.count("$ hificl ") > 20
