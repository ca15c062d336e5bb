"""Which trial trains where, and the processes that do it. All that imports Ray lies here.

In this file is done what has to be done before Ray is imported: its environment, and its token, which every cluster
that a sweep starts or joins asks for. Who has the token can run code on the cluster, so its file is for its owner
alone. Ray's own generator leaves it readable by everyone, which is why it is made here, before Ray looks for it.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from pathlib import Path

from pipeline.core import machine
from pipeline.core.errors import InputError
from pipeline.core.files import disk_error

# before any import of Ray: no call home, plain output of our own, our own handling of Ctrl-C
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a trial that diverged or failed has no score
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: other work on the machine would starve a sweep
os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # a busy laptop
os.environ.setdefault("RAY_AUTH_MODE", "token")


def ensure_token() -> Path | None:
    """Make Ray's token at its first use, and close its file to others; return the file.

    None where the environment says something else: RAY_AUTH_MODE other than token, or a token of its own.

    Raises:
        InputError: there is no place for the file, or it belongs to somebody else and can be read by others.
        WorkError: it cannot be written.
    """
    given = any(os.environ.get(name) for name in machine.TOKEN_VARIABLES)
    if given or os.environ.setdefault("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    path = machine.token_file()
    try:
        if not path.exists():
            _create(path)
        state = path.stat()
        if stat.S_IMODE(state.st_mode) & 0o077:
            if state.st_uid != os.getuid():
                raise InputError(
                    "Ray's token can be read by others", where=str(path), way_out="Have its owner chmod it to 600"
                )
            path.chmod(0o600)
    except OSError as error:
        raise disk_error(error, path) from error
    return path


def _create(path: Path) -> None:
    """Write a new token; of several processes at once, one wins and the others take its token."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".auth_token.", encoding="ascii") as draft:
        draft.write(secrets.token_hex(32))  # NamedTemporaryFile's mode is 600
        draft.flush()
        try:
            os.link(draft.name, path)
        except FileExistsError:
            return
