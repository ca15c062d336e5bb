"""An ssh server for machines without OpenSSH's: keys only, commands only. Usage: ssh_server.py ADDRESS HOST_KEY."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import asyncssh


async def serve_command(process: asyncssh.SSHServerProcess) -> None:
    child = await asyncio.create_subprocess_exec(
        "/bin/bash", "-c", process.command or "exec bash -l", cwd=os.environ["HOME"], start_new_session=True,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    feeding = asyncio.ensure_future(pass_on(process.stdin, child.stdin, closing=True))
    await asyncio.gather(pass_on(child.stdout, process.stdout), pass_on(child.stderr, process.stderr))
    status = await child.wait()
    feeding.cancel()
    process.exit(status if status >= 0 else 128 - status)


async def pass_on(source: Any, target: Any, *, closing: bool = False) -> None:
    """Copy a stream to its end; one whose reader is gone is read to its end all the same, as a daemon's must be."""
    try:
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
        if closing:
            target.close()
    except (OSError, asyncssh.Error):
        return


async def main(address: str, host_key: str) -> None:
    keys = str(Path(os.environ["HOME"]) / ".ssh/authorized_keys")
    await asyncssh.listen(
        address, 22, server_host_keys=[host_key], authorized_client_keys=keys, process_factory=serve_command,
        encoding=None, line_editor=False, allow_scp=False,
    )  # fmt: skip
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
