"""Where a number comes from: code, versions, machine, process and data digests; knows git and files, not MLflow."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path, PurePosixPath

from pipeline.config.load import FOLDERS, PARAMS
from pipeline.core.errors import InputError
from pipeline.core.locks import boot, started
from pipeline.core.plain_yaml import read_file
from pipeline.core.registry import extensions
from pipeline.records.trial import DataDigests, Machine, Provenance

LOCK = "dvc.lock"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "ray", "deepspeed", "mlflow", "dvc")
MAX_DIFF = 2_000_000  # characters: a diff beyond this is no edit of source any more
MAX_SOURCE = 250_000  # bytes of a changed file that is still kept in a diff
_SOURCE_FOLDERS = ("pipeline", "stages", *FOLDERS.values())
_SOURCE_KINDS = (".py", ".yaml", ".json")
# an address with a password, a private key, a token by its issuer's prefix
_SECRET = re.compile(
    r"://[^\s/:@]*:[^\s/@{}]+@|-----BEGIN [A-Z ]*PRIVATE KEY|\bA[KS]IA[0-9A-Z]{16}\b"
    r"|\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abp]-)[\w-]{16}"
)
_GIT_SECONDS = 20
_HOST, _BOOT, _PID, _STARTED = "owner.host", "owner.boot", "owner.pid", "owner.started"


def provenance(root: Path | str) -> Provenance:
    """Return what has to be the same for a number to come out again.

    Args:
        root: the project's root (a git checkout, or a copy without git).
    """
    root = Path(root)
    data = data_digests(root)
    code = checkout_state(code_root(root), generated=data.outs)
    return code.model_copy(update={"versions": versions(), "machine": this_machine(), "data": data})


def head_commit(root: Path | str = ".") -> str | None:
    """Return the commit of the checkout whose code runs in `root`, marked `-dirty` where it was changed since."""
    code = checkout_state(code_root(Path(root)))
    return code.commit and code.commit + ("-dirty" if code.dirty else "")


def code_root(root: Path) -> Path:
    """Return the checkout whose code runs in `root`: a workspace's `pipeline` is a link into it."""
    package = root / "pipeline"
    return package.resolve().parent if package.exists() else root


def checkout_state(root: Path | str, generated: Iterable[str] = ()) -> Provenance:
    """Return the code of the checkout at `root`: its commit, and what was changed since.

    The diff goes to MLflow, whose readers are others. A file that git does not know is in it only where it is code or
    settings by its place and name, for a local file of passwords is none; and nothing that looks like a secret is.

    A changed dvc.lock does not make a checkout dirty, nor does a tracked file that a stage writes: `dvc repro`
    rewrites both while it runs, so every run of a clean checkout would call itself dirty.

    Args:
        root: the project's root.
        generated: paths (relative to `root`) that stages write.
    """
    root = Path(root)
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    if commit is None:
        return Provenance(note=_why(root))
    listed = _git(root, "status", "--porcelain=v1", "-z", "--no-renames", "--untracked-files=all", "--", ".") or ""
    prefix = (_git(root, "rev-parse", "--show-prefix") or "").strip()
    states = {entry[3:].removeprefix(prefix): entry[:2] for entry in listed.split("\0") if len(entry) > 3}
    ignored = [LOCK, *generated]
    changed = [
        path for path in sorted(states) if not any(path == name or path.startswith(f"{name}/") for name in ignored)
    ]
    kept = [path for path in changed if not _is_big(root / path) and (states[path] != "??" or _is_source(path))]
    diff = _diff(root, kept)
    if _SECRET.search(diff):
        kept = [path for path in kept if not _SECRET.search(_diff(root, [path]))]
        diff = _diff(root, kept)
    left_out = [path for path in changed if path not in kept]
    if len(diff) > MAX_DIFF:
        diff = f"{diff[:MAX_DIFF]}\n(cut off: {len(diff)} characters)\n"
    return Provenance(
        commit=commit.strip(), dirty=bool(changed), changed=tuple(changed), left_out=tuple(left_out), diff=diff
    )


def _why(root: Path) -> str:
    """Return why there is no commit, and the way out where there is one."""
    try:
        done = _run_git(root, "rev-parse", "--is-inside-work-tree")
    except FileNotFoundError:
        return "git is not installed"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"git gave no answer ({error})"
    if done.returncode == 0:
        return "the git checkout has no commit yet"
    said = done.stderr.strip()
    if "not a git repository" in said:
        return "not a git checkout"
    return f"git refuses: {' '.join(said.removeprefix('fatal: ').split())}"  # of another user's it names the way out


def _is_source(path: str) -> bool:
    """Whether a file that git does not know can be code or settings that a run is made with."""
    return PurePosixPath(path).parts[0] in _SOURCE_FOLDERS and PurePosixPath(path).suffix in _SOURCE_KINDS


def _is_big(path: Path) -> bool:
    """Whether a file is too big to be source: weights or results, which are known by their own digests."""
    return path.is_file() and path.stat().st_size > MAX_SOURCE


def _diff(root: Path, changed: list[str]) -> str:
    """Return the diff of `changed` against the commit, files that git does not know yet included."""
    if not changed:
        return ""
    # an index of our own: new files are entered into it, the user's index is not touched
    index = Path((_git(root, "rev-parse", "--path-format=absolute", "--git-path", "index") or "").strip())
    with tempfile.TemporaryDirectory() as folder:
        copy = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        if index.is_file():
            shutil.copy2(index, copy["GIT_INDEX_FILE"])  # its time too: git reads files anew that are no older
        _git(root, "add", "--intent-to-add", "--ignore-removal", "--", *changed, environment=copy)
        wanted = ("diff", "--no-color", "--no-ext-diff", "--binary", "--no-renames", "HEAD", "--", *changed)
        return _git(root, *wanted, environment=copy) or ""


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of what a number depends on (None: not installed), extensions included."""
    out: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = None
    return out | extensions()


def this_machine() -> Machine:
    """Return processor, cores, memory (GiB) and GPUs."""
    system = f"{platform.system()} {platform.machine()}"
    return Machine(system=system, cpu=_cpu(), cores=os.cpu_count(), memory_gib=_memory_gib(), gpus=_gpus())


def data_digests(root: Path | str) -> DataDigests:
    """Return the md5 of params.yaml, profiles and studies (None without them), and of every output in dvc.lock."""
    root = Path(root)
    params = None
    if (root / PARAMS).is_file():
        written = hashlib.md5((root / PARAMS).read_bytes(), usedforsecurity=False)
        for file in sorted(path for folder in FOLDERS.values() for path in (root / folder).glob("*.yaml")):
            written.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
        params = written.hexdigest()
    outs: dict[str, str] = {}
    # DVC's own file, which DVC itself refuses where it is damaged
    with suppress(FileNotFoundError, InputError, AttributeError, KeyError, TypeError):
        for stage in read_file(root / LOCK)["stages"].values():
            for out in stage.get("outs") or []:
                outs[str(out["path"])] = str(out.get("md5") or out.get("etag") or "")
    return DataDigests(params=params, outs=dict(sorted(outs.items())))


def has_commit(root: Path | str, commit: str) -> bool:
    """Return whether the checkout at `root` knows a commit."""
    return _git(Path(root), "cat-file", "-e", f"{commit}^{{commit}}") is not None


def refused(root: Path) -> str | None:
    """Return why git as everybody calls it does not read the checkout; None where it does."""
    try:
        done = _run_git(root, "rev-parse", "HEAD", command=["git", "-C", str(root)])
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else " ".join(done.stderr.removeprefix("fatal: ").split())


def git_command(folder: Path) -> list[str]:
    """Return git's command in a folder whose own code is the one that runs.

    Git reads no checkout of another user (a mounted folder in a container), whose settings may start programs. This one
    runs already; a checkout around it is left to git's judgement.
    """
    return ["git", "-C", str(folder), "-c", f"safe.directory={folder.resolve()}"]


def _git(root: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str | None:
    """Return git's output, or None where git fails or is missing."""
    try:
        done = _run_git(root, *arguments, environment=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _run_git(
    root: Path, *arguments: str, environment: Mapping[str, str] | None = None, command: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    # without optional locks: a reading command must not disturb a commit that somebody makes meanwhile; and a name with
    # a star is a name
    settings = {"GIT_OPTIONAL_LOCKS": "0", "GIT_LITERAL_PATHSPECS": "1", "LC_ALL": "C", **(environment or {})}
    return subprocess.run(
        [*(command or git_command(root)), *arguments], capture_output=True, text=True, errors="replace",
        env={**os.environ, **settings}, check=False, timeout=_GIT_SECONDS,
    )  # fmt: skip


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _gpus() -> tuple[str, ...]:
    # the driver's own files: no import of torch, no start of a CUDA context
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Model:"):
                names.append(line.partition(":")[2].strip())
    return tuple(names)


def process_tags() -> dict[str, str]:
    """Return the tags that name this process: host, boot, process id, and when the process started."""
    pid = os.getpid()
    return {_HOST: socket.gethostname(), _BOOT: boot(), _PID: str(pid), _STARTED: started(pid)}


def process_is_gone(of_run: Mapping[str, str]) -> bool:
    """Return whether the process that `of_run` names has surely ended.

    Process ids are given out again, so the start time has to agree too. A process of another machine cannot be
    seen from here and counts as alive; two containers of one machine share the boot, not the host's name.
    """
    if _PID not in of_run:
        return False
    here = process_tags()
    if of_run.get(_HOST) != here[_HOST]:
        return False
    if of_run.get(_BOOT) != here[_BOOT]:
        return True
    now = started(int(of_run[_PID])) if of_run[_PID].isdigit() else ""
    return not now or now != of_run.get(_STARTED)


def code_tags(code: Provenance) -> dict[str, object]:
    """Return the tags that name a code version, given its provenance."""
    commit = {"mlflow.source.git.commit": code.commit} if code.commit else {}
    dirty = "unknown" if code.dirty is None else code.dirty
    note = {"git.note": code.note} if code.note else {}
    return {**commit, **note, "git.dirty": dirty, "mlflow.source.name": "hificl", "mlflow.source.type": "LOCAL"}


def earlier_commits(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Return the tag that keeps the commits a resumed run was begun at, when the code has moved on since."""
    old = before.get("mlflow.source.git.commit")
    if not old or old == now.get("mlflow.source.git.commit"):
        return {}
    return {"git.earlier_commits": " ".join(dict.fromkeys([*before.get("git.earlier_commits", "").split(), old]))}
