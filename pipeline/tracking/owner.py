"""Which process a run belongs to, so that the next start can end what a killed one left open."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

_HOST, _BOOT, _PID, _STARTED = "owner.host", "owner.boot", "owner.pid", "owner.started"


def tags() -> dict[str, str]:
    """Return the tags that name this process: host, boot, process id, and when the process started."""
    pid = os.getpid()
    return {_HOST: socket.gethostname(), _BOOT: _boot(), _PID: str(pid), _STARTED: _started(pid)}


def is_gone(of_run: Mapping[str, str]) -> bool:
    """Return whether the process that `of_run` names has surely ended.

    Process ids are given out again, so the start time has to agree too. A process of another machine cannot be
    seen from here and counts as alive; two containers of one machine share the boot, not the host's name.
    """
    if _PID not in of_run:
        return False
    mine = tags()
    if of_run.get(_HOST) != mine[_HOST]:
        return False
    if of_run.get(_BOOT) != mine[_BOOT]:
        return True
    started = _started(int(of_run[_PID])) if of_run[_PID].isdigit() else ""
    return not started or started != of_run.get(_STARTED)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"


def _started(pid: int) -> str:
    """Return the start of a process in clock ticks since boot; empty when it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # the name before may hold spaces and brackets
    return "" if fields[0] in "ZX" else fields[19]
