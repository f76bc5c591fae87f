"""A small HTTP scorer, on the standard library alone, that speaks the reward formats of OpenRLHF and of verl.

- ``POST /get_reward`` ``{"query": [...], "prompts": [...]}`` gives ``{"rewards", "scores", "extra_logs"}`` (OpenRLHF's
  ``--remote_rm_url``).
- ``POST /classify`` ``{"input": ...}`` gives ``{"data": [{"probs": [score]}]}``, and ``POST /v1/embeddings`` the same
  with ``"embedding": [score]`` (what verl asks reward models for, of vLLM and of SGLang).
- ``GET /health`` says that the model is there.

An item is a conversation as text, rendered with the reward model's own chat template, or a list of turns. One model
scores what all requests that are waiting ask, together. A request is refused where it comes from a web page, names this
machine by a name that was not allowed (which is how a page reaches a local server, by rebinding its own name), is too
large or too slow, or lacks the key.
"""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from rlaif.reward_service import DRAIN_SECONDS, Refused, Service

MAX_CONNECTIONS = 256
READ_SECONDS = 30.0  # for all of a request to arrive, and for the next one on a connection to begin


class Handler(BaseHTTPRequestHandler):
    """Reads requests and writes answers; what they mean is `Service`'s."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "rlaif", ""
    timeout = READ_SECONDS  # for each piece that is read or written
    server: "Server"

    def handle_one_request(self) -> None:
        """Handle a request, and cut the connection where it does not arrive in time, however slowly it drips."""
        self._deadline = threading.Timer(READ_SECONDS, self._cut)
        self._deadline.daemon = True
        self._deadline.start()
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        finally:
            self._deadline.cancel()

    def _cut(self) -> None:
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def do_GET(self) -> None:
        """Answer a GET request."""
        with self.server.answering():
            self._serve()

    def do_POST(self) -> None:
        """Answer a POST request."""
        with self.server.answering():
            self._serve()

    def _serve(self) -> None:
        path = self.path.partition("?")[0]
        try:
            size = self.server.service.admit(self.command, path, self.headers)
            body = self.rfile.read(size)
            self._deadline.cancel()
            if len(body) < size:
                self.close_connection = True
                return
            status, answer = 200, self.server.service.answer(path, body)
        except Refused as refusal:
            # What was not read of a body would be taken for the next request.
            self.close_connection = True
            status, answer = refusal.status, {"error": str(refusal)}
        self._send(status, answer)

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no HTTP request with JSON as well, without repeating what was sent."""
        self.close_connection = True
        self._send(code, {"error": self.responses.get(code, ("not served",))[0]})

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: requests hold people's texts."""


class Server(ThreadingHTTPServer):
    """A thread for each connection, a bounded number of them."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], service: Service, say: Callable[[str], None]):
        """Bind to an address; port 0 chooses a free one.

        Raises:
            OSError: the address is taken, or not of this machine.
        """
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.service, self._say = service, say
        self._free = threading.Semaphore(MAX_CONNECTIONS)
        self._answering, self._idle = 0, threading.Condition()
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Bind without asking a name server for this machine's name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own, or tell it that there are too many."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        with suppress(OSError):
            request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in one line that a connection broke; the exception itself is about a socket of somebody else's."""
        self._say("a connection ended with an error")

    def run(self) -> None:
        """Serve until the model's thread ends or an interrupt comes; then let what is being scored be answered."""
        try:
            self.serve_forever()
        finally:
            self.server_close()
            self.service.batches.stop()
            with self._idle:
                self._idle.wait_for(lambda: not self._answering, DRAIN_SECONDS)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request as under way, so that the end waits for its answer."""
        with self._idle:
            self._answering += 1
        try:
            yield
        finally:
            with self._idle:
                self._answering -= 1
                self._idle.notify_all()
