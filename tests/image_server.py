"""A web server of files in memory, slow or failing on demand."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ImageServer:
    """files: content by path. failures: statuses to answer with first, by path. requests: method and path of each."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.failures: dict[str, list[int]] = {}
        self.requests: list[tuple[str, str]] = []
        self.latency = 0.0
        self.endless = False
        self.ranges = True
        self.url = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[ImageServer]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                owner.requests.append((self.command, self.path))
                time.sleep(owner.latency)
                content, status = owner.files.get(self.path), 200
                if failing := owner.failures.get(self.path):
                    content, status = b"", failing.pop(0)
                elif content is None:
                    content, status = b"", 404
                whole = len(content)
                tag = f'"{hash(content):x}"'
                if (asked := self.headers.get("Range")) and status == 200 and owner.ranges:
                    first, last = re.findall(r"(\d+)-(\d*)", asked)[0]
                    end = int(last) + 1 if last else whole
                    content, status = content[int(first) : end], 206
                self.send_response(status)
                if status == 206:
                    self.send_header("Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{whole}")
                self.send_header("ETag", tag)
                if owner.endless and self.command == "GET":
                    self.send_header("Connection", "close")
                    self.end_headers()
                    self.close_connection = True
                    with contextlib.suppress(OSError):
                        while True:
                            self.wfile.write(content or b"\0" * 65536)
                    return
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

        with Server(("127.0.0.1", 0), Handler) as server:
            self.url = f"http://127.0.0.1:{server.server_port}"
            thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()
