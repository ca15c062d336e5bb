#!/usr/bin/env python3
"""What Ray asks of rsync, for machines without it: one file to a host, over ssh, its mode kept."""

from __future__ import annotations

import shlex
import stat
import subprocess
import sys
from pathlib import Path


def main(words: list[str]) -> int:
    rsh = words[words.index("--rsh") + 1] if "--rsh" in words else words[words.index("-e") + 1]
    source, (host, _, target) = Path(words[-2]).expanduser(), words[-1].partition(":")
    if not source.is_file() or not target:
        print(f"rsync stand-in: only single files go up, got {words[-2:]}", file=sys.stderr)
        return 2
    mode = stat.S_IMODE(source.stat().st_mode)
    place = f'"$HOME"/{shlex.quote(target[2:])}' if target.startswith("~/") else shlex.quote(target)
    put = f'umask 077; t={place}; mkdir -p "$(dirname "$t")" && cat > "$t" && chmod {mode:o} "$t"'
    with source.open("rb") as content:
        return subprocess.run([*shlex.split(rsh), host, put], stdin=content, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
