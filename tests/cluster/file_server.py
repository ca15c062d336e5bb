"""Serves this machine's files by SFTP to whoever connects. Usage: file_server.py ADDRESS PORT SFTP_SERVER."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading


def main(address: str, port: str, program: str) -> None:
    with socket.create_server((address, int(port))) as server:
        while True:
            link, _ = server.accept()
            with link:
                child = subprocess.Popen([program, "-e"], stdin=link, stdout=link)
            threading.Thread(target=child.wait, daemon=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
