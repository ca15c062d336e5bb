"""The code of a commit in a folder of its own, with the diff of a dirty tree applied."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.errors import InputError, WorkError
from pipeline.records.trial import Provenance
from pipeline.tracking.provenance import git_command, has_commit

_CUT = "(cut off:"  # how a diff that was too long ends


def check_code(repository: Path, provenance: Provenance, run_id: str) -> None:
    """Check that a run's code can be had again.

    Raises:
        InputError: no commit recorded, one that this repository does not know, or changes that were not kept.
    """
    commit = provenance.commit
    here = "Give --here to run the code as it is now"
    if not commit:
        note = provenance.note or "nothing was recorded"
        raise InputError(f"the run's code version is unknown: {note}", where=run_id, way_out=here)
    if not has_commit(repository, commit):
        raise InputError(
            f"commit {commit} is not in this repository", where=str(repository), way_out=f"Fetch it. {here}"
        )
    diff = provenance.diff
    only_big = not diff and set(provenance.changed) <= set(provenance.left_out)
    if provenance.dirty and ((not diff and not only_big) or _CUT in diff[-200:]):
        changed = ", ".join(provenance.changed[:5])
        raise InputError(
            f"the run was made from a dirty tree whose changes were not kept whole ({changed})",
            where=run_id, way_out=here,
        )  # fmt: skip


@contextmanager
def checked_out(repository: Path, provenance: Provenance, folder: Path) -> Iterator[Path]:
    """Give a folder with a run's code, which is removed at the end.

    Args:
        repository: the checkout.
        provenance: the run's; `check_code` has accepted it.
        folder: where the worktree goes; it must not exist.

    Raises:
        WorkError: git failed.
    """
    _git(repository, "worktree", "add", "--detach", "--quiet", str(folder), str(provenance.commit))
    try:
        if provenance.diff:
            _git(folder, "apply", "--whitespace=nowarn", "-", text=provenance.diff)
        prefix = _git(repository, "rev-parse", "--show-prefix").strip()
        yield folder / prefix
    finally:
        _git(repository, "worktree", "remove", "--force", str(folder))


def _git(folder: Path, *arguments: str, text: str | None = None) -> str:
    # no hooks: a checkout here is nobody's business
    command = [*git_command(folder), "-c", "core.hooksPath=/dev/null", *arguments]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise WorkError(f"git {arguments[0]} failed: {last}", where=str(folder))
    return done.stdout
