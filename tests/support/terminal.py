"""A command in a terminal of its own, as a user's is: it shows what it shows to people, and keys reach it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

# the terminal has to be the session's own, or a key would signal nobody
LOGIN = "import os, sys; os.login_tty(0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


class Terminal:
    """A Python command (`-m dvc repro`) in a terminal; what it shows goes into the file `log`."""

    def __init__(self, words: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._keys, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOGIN, *words], cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs,
            env={**environment, "TERM": "xterm-256color"},
        )  # fmt: skip
        os.close(theirs)
        self._copied = threading.Thread(target=self._copy, args=(log.open("wb", buffering=0),), daemon=True)
        self._copied.start()

    def _copy(self, log) -> None:
        with log:
            try:
                while part := os.read(self._keys, 65536):
                    log.write(part)
            except OSError:  # the other end is closed
                pass

    def press(self, key: bytes) -> None:
        """Send a key; Ctrl-C is `b"\\x03"`."""
        os.write(self._keys, key)

    def close(self) -> str:
        """Return all that was shown, once no process holds the terminal any more."""
        self._copied.join(10)
        os.close(self._keys)
        return self.log.read_text(errors="replace")
