"""EC2's metadata service, as far as a spot instance's end is read from it: version 2, which asks for a token."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "of-this-instance"


class SpotMetadata:
    """A service on loopback; `ends_in` seconds the instance is taken away, None: not yet."""

    def __init__(self) -> None:
        self.ends_in: float | None = None
        self.looks = 0
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                known = self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
                self._answer(200 if self.path == "/latest/api/token" and known else 400, TOKEN)

            def do_GET(self) -> None:
                if self.headers["X-aws-ec2-metadata-token"] != TOKEN:
                    return self._answer(401, "")
                service.looks += 1
                if service.ends_in is None or self.path != "/latest/meta-data/spot/instance-action":
                    return self._answer(404, "")
                at = datetime.now(UTC) + timedelta(seconds=service.ends_in)
                return self._answer(200, json.dumps({"action": "terminate", "time": f"{at:%Y-%m-%dT%H:%M:%SZ}"}))

            def _answer(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
