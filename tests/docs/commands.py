"""The commands that the documentation shows, and those of them that are not run here, each with its reason."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
INLINE = re.compile(r"`((?:hificl|make) [^`\n]+)`")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHELLS = ("bash", "sh", "console")
PROGRAMS = re.compile(r"(?:\.venv/bin/)?(?:hificl|make|python -m|dvc) ")  # what is a command in a block of no language
PROMPT = "$ "

# What is not run, and why. `hificl` commands are parsed all the same, `make` targets resolved, modules found.
NOT_RUN: dict[str, str] = {
    r"make (repro|test|setup|check|bench|clean|test-\w+|repro-real|pictures)\b.*": "runs for minutes, in CI of its own",
    r"make real-weights .*": "runs for hours; a share of it by tests/sweep/test_real_weights.py",
    r"(source|cd|eval) .*": "a shell's own",
    r"dvc repro( .*)?": "run by tests/e2e/test_pipeline.py; the new task's by test_extending.py",
    r"dvc (exp|metrics|params|plots|queue) .*": "run by tests/e2e/test_experiments.py",
    r"hificl ui.*": "a server: run by tests/tracking/test_ui.py",
    r"(hificl serve|curl) .*": "a server and its clients: run by tests/commands/test_serve.py",
    r"hificl work .*": "trains: run by tests/sweep/test_leases.py",
    r"hificl (reproduce|run-trial) .*": "trains: run by tests/e2e/test_lineage.py",
    r"hificl (stop|resume|clone|extend) .*": "changes trials: run by tests/e2e/test_lineage.py",
    r"hificl study by-hand": "trains: run by tests/e2e/test_lineage.py",
    r"hificl study (sink-beside-hificl)": "run by tests/docs/test_extending.py",
    r"hificl params .*--method sink .*": "run by tests/docs/test_extending.py",
    r"hificl predict .*Which colour.*": "the same as the one with a shape",
    r"hificl score .*": "run with their numbers by tests/docs/test_score_commands.py",
    r"hificl bench (?!--).*": "run by tests/bench/test_verbs.py at small sizes",
    r"hificl plan .*": "reads the real profile: run by tests/cost/test_forecast.py",
    r"hificl pretrain .*": "takes up to half an hour",
    r"hificl (world|workspace) .*": "run by tests/miniature/test_world.py and tests/e2e",
    r"hificl sweep --study (?!hificl|mimic).*": "a study of the miniature",
    r"hificl adapt .*": "trains: run, with what the page shows behind it, by tests/e2e/test_adapt.py",
    r"hificl predict --adapter work/pets/.*": "likewise",
    r"hificl (export|push) .*": "run by tests/docs/test_adapters.py",
    r"python -m (lmms_eval|pipeline\.evaluate\.harness) .*": "run by `make test-harness`",
    r"hificl params --backbone folder:.*": "a folder of random weights: run by tests/backbones/test_generic.py",
    r"pip (wheel|install) .*": "run by tests/test_packaging.py",
    r"mlflow models predict .*": "makes an environment: run by tests/tracking/test_models.py, `make test-models`",
    r"docker .*": "run by tests/cluster/test_image.py, `make test-image`",
    r"python -m benchmarks\..*": "needs a GPU",
    r"python -m pip install .*": "from a registry; tests/test_makefile.py holds it to the extra",
    r"python -m tests\..*": "measures or takes pictures for minutes",
}


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """Its words, without a comment and without the environment's folder."""
        return [word.removeprefix(".venv/bin/") for word in shlex.split(self.text, comments=True)]

    @property
    def reason(self) -> str | None:
        """Why it is not run; None: it is."""
        plain = " ".join(self.words)
        return next((why for form, why in NOT_RUN.items() if re.fullmatch(form, plain)), None)


def commands_of(page: Path) -> list[Command]:
    """Return the commands of a page's blocks; `console` blocks mark theirs with a prompt."""
    found = []
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        lines = block.replace("\\\n", " ").splitlines()
        if language not in SHELLS:
            lines = [] if language else [line for line in lines if PROGRAMS.match(line)]
        if any(line.startswith(PROMPT) for line in lines):
            lines = [line.removeprefix(PROMPT) for line in lines if line.startswith(PROMPT)]
        found += [Command(page.name, line.strip()) for line in lines if line.split("#")[0].strip()]
    return found


def inline() -> list[Command]:
    """Return what stands in running text as a command, each once."""
    found = [Command(page.name, text) for page in PAGES for text in INLINE.findall(page.read_text(encoding="utf-8"))]
    return list({one.text: one for one in found}.values())


def every() -> list[Command]:
    """Return the commands of all pages, each once; those of faq.md have a test of their own."""
    once = {" ".join(one.words): one for page in PAGES if page.name != "faq.md" for one in commands_of(page)}
    return list(once.values())
