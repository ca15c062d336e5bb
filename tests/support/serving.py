"""`hificl serve` as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai

from tests.conftest import ROOT

BACKBONE = "mini-idefics2"
TOKEN, ADMIN = "the-token-of-the-tests", "the-admins-token-of-the-tests"


class Server:
    """A running server on one of the miniature's backbones, with its tokens in a home of its own."""

    def __init__(self, words, home: Path, cwd: Path = ROOT, **variables):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HIFICL_SERVE")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "serve", "--backbone", BACKBONE, "--port", "0", *words], cwd=cwd,
            env={**environment, "HOME": str(home), "PYTHONPATH": str(ROOT), **variables}, text=True,
            stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.lines: list[str] = []
        self.url = None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"(http://\S+)/v1", line):
                self.url = found[1]
            if "token" in line:
                break
        assert self.url, "".join(self.lines)
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self.reader.start()
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health").close()
                return
            time.sleep(0.1)
        raise AssertionError("".join(self.lines))

    def client(self, token=TOKEN):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0, timeout=120)

    def call(self, path, body=None, token=ADMIN, method=None, data=None):
        """Return status and body of a plain request."""
        data = json.dumps(body).encode() if body is not None else data
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        self.reader.join(10)
        return status
