"""YAML is read as DVC reads it: what is tracked as a parameter is what is trained with."""

import math

import pytest
from dvc.utils.serialize import dumps_yaml, loads_yaml

from pipeline.config.load import load
from pipeline.core.errors import InputError
from pipeline.core.plain_yaml import read, read_file, write
from tests.conftest import ROOT

NUMBERS = {
    "1e-5": 1e-5, "5e-3": 0.005, "1E5": 1e5, "+1e3": 1000.0, "-1e-3": -0.001, "1.e3": 1000.0, "1.0e5": 1e5,
    "1e+22": 1e22, ".5": 0.5, "1.": 1.0, "0.001": 0.001, "-.inf": -math.inf, "0": 0, "-0": 0, "16": 16, "1_000": 1000,
    "0o17": 15,
    "017": 17, "08": 8, "0x1F": 31, "0b11": 3,
}  # fmt: skip
TEXTS = [
    "yes", "no", "on", "off", "y", "N", "Yes", "OFF", "12:30:45", "1:30", "190:20:30", "1e", "1e5.5", "0x", "0o",
    "1,000", "inf", "nan", ".5e3", "2026-1-2", "v1.0", "mini-vqa",
]  # fmt: skip
OTHERS = {"true": True, "True": True, "FALSE": False, "null": None, "~": None, "": None}


@pytest.mark.parametrize(("text", "value"), [*NUMBERS.items(), *((one, one) for one in TEXTS), *OTHERS.items()])
def test_every_literal_is_read_as_dvc_reads_it(text, value):
    document = f"train:\n  a: {text}\n  b:\n  - {text}\nb: {text}\n"
    ours = read(document, "params.yaml")
    assert ours == loads_yaml(document)
    assert (type(ours["b"]), ours["b"]) == (type(value), value)
    assert read(text, "--set b") == value


def test_the_projects_own_files_are_read_as_dvc_reads_them():
    files = [path for form in ("*", "pipeline/**/*", "profiles/*", "studies/*") for path in ROOT.glob(f"{form}.yaml")]
    assert {"params.yaml", "dvc.yaml", "papers.yaml"} <= {path.name for path in files}
    for path in files:
        assert read_file(path) == loads_yaml(path.read_text(encoding="utf-8")), path


def test_what_is_written_is_read_again_by_both():
    texts = [
        *NUMBERS,
        *TEXTS,
        *OTHERS,
        "2026-01-02",
        "a: b",
        "# c",
        " d ",
        "ü 語 #3",
        "line\nline\n",
        "'",
        '"',
        "=",
        "<<",
        "x" * 500,
    ]
    values = {"z": texts, "a": [*NUMBERS.values(), *OTHERS.values()], "deep": {"l": [{}, [], [[1e-7]]]}, "yes": 1}
    text = write(values)
    assert read(text, "x") == loads_yaml(text) == values
    assert list(read(text, "x")) == ["z", "a", "deep", "yes"]
    assert read(dumps_yaml(values), "x") == values  # as `dvc exp run -S` leaves it


def test_a_learning_rate_without_a_decimal_point_is_a_number():
    for text in ("1e-5", "0.00001", "1.0e-5"):
        assert load(ROOT / "params.yaml", [f"train.learning_rate={text}"]).train.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: {c: 1, c: 2}\n", 'found duplicate key "c".*, line 2'),
        ("a: 1\nb: 2026-01-02\n", r"'2026-01-02' \(line 2\) for a date. Put it in quotes"),
        ("a: 0o_\n", "not readable as YAML"),
        ("a: 1\n---\nb: 1\n", "another document, line 2"),
        ("a: [1, 2\nb: 3\n", "did not find expected .*, line 2"),
        ("a: *b\n", "undefined alias, line 1"),
        ("a: \ud800\n", "not readable as YAML"),
        ("a: \x00\n", "control characters"),
    ],
    ids=["twice", "date", "octal", "documents", "bracket", "alias", "surrogate", "zero byte"],
)
def test_what_cannot_be_read_is_told_in_one_line_with_its_place(text, says):
    with pytest.raises(InputError, match=says) as caught:
        read(text, "params.yaml")
    assert str(caught.value).startswith("params.yaml: ") and "\n" not in str(caught.value)
