"""What a copy of the project says of itself: licence, notice, citation, the papers, and what a wheel holds."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser

import jsonschema
import pytest
from packaging.requirements import Requirement

from pipeline.core.plain_yaml import read_file
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAPERS = read_file(ROOT / "pipeline/config/papers/papers.yaml")


@pytest.fixture(scope="module")
def citation():
    return read_file(ROOT / "CITATION.cff")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from what git knows, as a release is, without a look at the network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("pipeline", "stages", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "out", "."]
    subprocess.run([sys.executable, "-m", "pip", *words], cwd=folder, check=True, timeout=300,
                   env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})  # fmt: skip
    (file,) = (folder / "out").glob("*.whl")
    with zipfile.ZipFile(file) as opened:
        yield opened


def test_the_citation_is_valid_by_the_formats_own_schema(citation):
    schema = json.loads((ROOT / "tests/golden/cff-schema-1.2.0.json").read_text(encoding="utf-8"))
    jsonschema.Draft7Validator(schema).validate(citation)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate({**citation, "licence": "Apache-2.0"})
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"


def test_both_papers_are_named_with_title_and_number(citation):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    cited = {row["title"]: row["identifiers"][0]["value"] for row in citation["references"]}
    assert set(cited) == {paper["title"] for paper in PAPERS.values()}
    for title, number in cited.items():
        assert re.search(rf"{re.escape(title)}\*,[^\n]*{re.escape(number)}\b", readme), title


def test_the_licence_is_the_whole_apache_licence():
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License")
    assert all(f"\n   {number}. " in text for number in range(1, 10))
    assert "END OF TERMS AND CONDITIONS" in text and "APPENDIX: How to apply the Apache License" in text


def test_what_stems_from_others_is_in_the_notice():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for words in ("2011-2013 University of Antwerp", "2014, Aishwarya Agrawal", "BSD 2-Clause license", "CC BY 4.0"):
        assert words in notice
    for path in re.findall(r"(?<![\w/])(?:pipeline|benchmarks|tests|docs)/[\w./*-]*\w", notice):
        assert list(ROOT.glob(path)), f"NOTICE names {path}, which is not there"
    # CHAIR's file as published: whoever changes it has to say so there
    synonyms = (ROOT / "pipeline/scores/data/chair_synonyms.txt").read_bytes()
    assert hashlib.sha256(synonyms).hexdigest() == "b685537b36fe21b791c87151b96a991ceb582edff19f3da204dcc7a7905502f2", (
        "NOTICE says that it is unchanged"
    )


def test_a_wheel_holds_the_licence_and_what_the_code_reads(wheel):
    names = set(wheel.namelist())
    info = f"hificl_lab-{PROJECT['version']}.dist-info"
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= names
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert wheel.read(f"{info}/licenses/NOTICE") == (ROOT / "NOTICE").read_bytes()
    files = [path for top in ("pipeline", "stages") for path in (ROOT / top).rglob("*") if path.is_file()]
    files += (ROOT / "benchmarks").rglob("*.py")  # without its results
    missing = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts} - names
    assert not missing, "package-data of pyproject.toml leaves these out"


def pins(text):
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]


def here(requirements, system, machine, python):
    environment = {"sys_platform": system, "platform_machine": machine, "python_full_version": f"{python}.0",
                   "python_version": python, "platform_system": {"linux": "Linux", "darwin": "Darwin"}[system],
                   "implementation_name": "cpython", "platform_python_implementation": "CPython"}  # fmt: skip
    return {one.name: one for one in requirements if one.marker is None or one.marker.evaluate(environment)}


CUDA = re.compile(r"(cuda|nvidia)-.*|triton")


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize(("system", "machine"), [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")])
def test_the_pins_are_whole_on_linux_and_macos(system, machine, python):
    found = here(pins((ROOT / "requirements.txt").read_text()), system, machine, python)
    assert all(str(one.specifier).startswith("==") and not one.url for one in found.values())
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    for one in here([Requirement(line) for line in asked], system, machine, python).values():
        name = re.sub(r"[-_.]+", "-", one.name.lower())
        assert name in found and one.specifier.contains(str(found[name].specifier).removeprefix("=="))
    assert (system == "linux") == ("deepspeed" in found) == any(CUDA.fullmatch(name) for name in found)


def test_setup_without_cuda_leaves_out_cuda_alone():
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", ".venv/.ready", "TORCH=cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    (command,) = [line for line in done.stdout.replace("\\\n", " ").splitlines() if "-r -" in line]
    assert "--torch-backend cpu" in command
    kept = subprocess.run(["bash", "-c", command.split("|  VIRTUAL_ENV")[0].split("| VIRTUAL_ENV")[0]], cwd=ROOT,
                          capture_output=True, text=True, check=True).stdout  # fmt: skip
    whole = {one.name for one in pins((ROOT / "requirements.txt").read_text())}
    left_out = whole - {one.name for one in pins(kept)}
    assert left_out == {name for name in whole if CUDA.fullmatch(name)} and len(left_out) > 15
    assert {"torch", "torchvision"} <= whole - left_out


def test_setup_refuses_another_torch():
    done = subprocess.run(["make", "-n", "setup", "TORCH=rocm"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "TORCH is cpu or nothing, not rocm" in done.stderr
