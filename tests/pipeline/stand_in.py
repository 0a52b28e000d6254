"""A small HTTP server that stands for an API."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: Any


@contextlib.contextmanager
def serving(answer: Callable[[Request], tuple[int, Any] | None]) -> Iterator[str]:
    """Serves on a free port of the loopback; gives the address.

    ``answer`` returns the status and what is sent as JSON, a string as it is; or None, to close the connection.
    """

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def handle_request(self) -> None:
            size, url = int(self.headers.get("Content-Length") or 0), urlsplit(self.path)
            body = json.loads(self.rfile.read(size)) if size else None
            answered = answer(Request(self.command, url.path, parse_qs(url.query), self.headers, body))
            if answered is None:
                self.close_connection = True
                return
            status, content = answered
            sent = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = do_DELETE = handle_request

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
