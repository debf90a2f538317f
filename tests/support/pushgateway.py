"""A small HTTP server that takes what is pushed to it, as a Pushgateway does."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Gateway:
    """Where it listens, and what was pushed: method, path and body of each request."""

    url: str
    pushed: list[tuple[str, str, str]] = field(default_factory=list)

    def samples(self) -> dict[str, float]:
        """Return the samples of the last push, by name and labels."""
        lines = [line for line in self.pushed[-1][2].splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@contextmanager
def pushgateway() -> Iterator[Gateway]:
    """Run one on loopback inside the context."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            gateway.pushed.append((self.command, self.path, body))
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            self.do_PUT()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        gateway = Gateway(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield gateway
        finally:
            server.shutdown()
            thread.join()
