"""Reading official JSON files record by record, and every way in which one can be bad."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from pipeline.core.errors import InputError
from pipeline.data import official as records
from pipeline.data.official import RecordFile, field, find, source_digest

RECORDS = [
    {"question_id": n, "text": f'Wie groß war es? "{n}" \\ ☃', "nested": [{"a": [n, 1.5, None, True]}]}
    for n in range(50)
]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(path: Path, **expect: str) -> list[dict]:
    return [record for _, _, record in RecordFile(path, ["questions"], expect=expect)]


def message(path: Path, **expect: str) -> str:
    with pytest.raises(InputError) as caught:
        read(path, **expect)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("layout", [{}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}])
def test_any_block_size_gives_what_json_gives(tmp_path, monkeypatch, block, layout):
    monkeypatch.setattr(records, "_CHUNK", block)
    whole = {"info": {"year": 2017}, "number": 1234567, "questions": RECORDS, "data_subtype": "train2014", "empty": []}
    path = write(tmp_path / "q.json", json.dumps(whole, **layout))
    file = RecordFile(path, ["questions"], expect={"data_subtype": "train2014"})
    assert list(file) == [("questions", n, record) for n, record in enumerate(RECORDS)]
    assert file.header == {key: value for key, value in whole.items() if key != "questions"}
    assert list(file) == list(file)  # it can be read again


def test_a_byte_order_mark_is_tolerated(tmp_path):
    path = write(tmp_path / "q.json", b"\xef\xbb\xbf" + json.dumps({"questions": RECORDS}).encode())
    assert read(path) == RECORDS


@pytest.mark.parametrize("block", [16, 1 << 20])
def test_a_truncated_file_says_where_it_ends(tmp_path, monkeypatch, block):
    monkeypatch.setattr(records, "_CHUNK", block)
    whole = json.dumps({"data_subtype": "train2014", "questions": RECORDS}).encode()
    cuts = sorted(random.Random(0).sample(range(1, len(whole)), 60)) + [len(whole) - 1]
    for cut in cuts:
        text = message(write(tmp_path / "q.json", whole[:cut]))
        assert "cut short" in text or "not UTF-8" in text, (cut, text)
    record = whole.index(b'"question_id": 7')
    text = message(write(tmp_path / "q.json", whole[: record + 20]))
    assert "in record 7 of 'questions'" in text and f"byte {record + 20}" in text


def test_damage_in_the_middle_names_record_and_byte(tmp_path):
    whole = json.dumps({"questions": RECORDS}, ensure_ascii=False)
    at = whole.index('"question_id": 30')
    text = message(write(tmp_path / "q.json", whole[:at] + "?" + whole[at + 1 :]))
    assert "not valid JSON in record 30" in text
    assert f"byte {len(whole[:at].encode())}" in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"PK\x03\x04rest", "zip archive"),
        (b"<!DOCTYPE html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"[1, 2]", "the top level is a list; an object with 'questions' is needed"),
        (b"hello", "no JSON object"),
        (b'{"annotations": []}', "the list 'questions' is missing. The file has annotations"),
        (b"{}", "the list 'questions' is missing. The file has nothing"),
        (b'{"questions": {"a": 1}}', "'questions' is not a list"),
        (b'{"questions": [{"a": 1}, 3]}', "record 1 of 'questions' is a whole number"),
        (b'{"questions": [{"a": 1} {"a": 2}]}', "after record 0 of 'questions'"),
        (b'{"questions": []} {"questions": []}', "text after the closing"),
        (b'{"questions": [], }', "not valid JSON"),
        (b'{"questions" 1}', "after the key 'questions'"),
        (b'{"questions": [{"a": "\xff\xfe"}]}', "not UTF-8"),
        (b'{"questions": [{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]}", "not valid JSON"),
    ],
)
def test_other_contents_are_named(tmp_path, content, says):
    assert says in message(write(tmp_path / "q.json", content))


@pytest.mark.parametrize("order", [0, 1])
def test_the_wrong_split_is_named(tmp_path, order):
    items = [("data_subtype", "val2014"), ("questions", RECORDS)]
    path = write(tmp_path / "q.json", json.dumps(dict(items[::-1] if order else items)))
    text = message(path, data_subtype="train2014")
    assert "'data_subtype' is 'val2014', but 'train2014' is needed" in text and "swapped" in text


def test_a_missing_split_name_is_named(tmp_path):
    path = write(tmp_path / "q.json", json.dumps({"questions": []}))
    assert "'data_subtype' is missing" in message(path, data_subtype="train2014")


def test_a_missing_file_is_named_with_every_place(tmp_path):
    assert "cannot be read" in message(tmp_path / "absent.json")
    with pytest.raises(InputError, match=r"a/q\.json, b/q\.json"):
        find(tmp_path, ["a", "b"], "q.json")
    (tmp_path / "b").mkdir()
    assert find(tmp_path, ["a", "b"], ".") == tmp_path / "b"


def test_fields_are_checked(tmp_path):
    assert field({"n": 3}, "n", int, "here") == 3
    with pytest.raises(InputError, match="here: field 'n' is missing. The record has the fields m"):
        field({"m": 3}, "n", int, "here")
    with pytest.raises(InputError, match=r"field 'n' is \"3\" \(string\). It must be a whole number"):
        field({"n": "3"}, "n", int, lambda: "here")
    with pytest.raises(InputError, match=r"true \(true/false\)"):
        field({"n": True}, "n", int, "here")
    with pytest.raises(InputError, match=r"null \(null\). It must be a string or whole number"):
        field({"n": None}, "n", (str, int), "here")


def test_the_digest_is_sha256(tmp_path):
    path = write(tmp_path / "f", b"abc")
    assert source_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
