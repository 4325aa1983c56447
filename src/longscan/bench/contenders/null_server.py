"""A chat server that computes nothing: the most that a client and HTTP allow.

`python -m longscan.bench.contenders.null_server PORT`. It streams `max_tokens` pieces of text as fast as it
can.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["main"]


class _Handler(BaseHTTPRequestHandler):
    """Answers every GET with nothing and every POST with a stream."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Say that the server is ready."""
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        """Stream an answer."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(body["max_tokens"]):
            self._send({"delta": {"content": " word"}, "finish_reason": None})
        self._send({"delta": {}, "finish_reason": "length"})
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, choice: dict[str, object]) -> None:
        """Send an event as a chunk of its own, as servers do."""
        data = b"data: " + json.dumps({"choices": [{"index": 0, **choice}]}).encode() + b"\n\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # 5 would let many streams at once wait for a second attempt


def main() -> None:
    """Serve until the process is ended."""
    _Server(("127.0.0.1", int(sys.argv[1])), _Handler).serve_forever()


if __name__ == "__main__":
    main()
