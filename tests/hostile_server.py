"""A server of chat completions that behaves as a test says, in a thread of the test's own process.

It listens on 127.0.0.1, keeps every request, and answers each by a function of the request: by default with words that
depend on the conversation and the seed alone.
"""

import hashlib
import json
import math
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = ["ask", "bring", "carry", "doubt", "every", "find", "give", "hold", "just", "keep", "learn", "mind", "never"]


@dataclass
class Asked:
    """One request: its path, headers and body, and how many like it came before."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    before: int

    @property
    def text(self) -> str:
        return str(self.body["messages"][-1]["content"])

    @property
    def is_probe(self) -> bool:
        return self.text == "Say yes."


@dataclass
class Reply:
    """What is sent back. `cut` bytes of the body are sent before the connection is reset; `wait` holds all back."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    wait: threading.Event | None = None


Behaviour = Callable[[Asked], Reply]


def key_of(body: dict[str, Any]) -> str:
    content = json.dumps([body.get("messages", body), body.get("seed"), body.get("max_tokens")], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def words(asked: Asked) -> Reply:
    """Answer with a sentence that depends on what was asked; a choice prefers A or B by the same."""
    digest = hashlib.sha256(key_of(asked.body).encode()).digest()
    if asked.body.get("logprobs"):
        share = 0.1 + 0.8 * digest[0] / 255
        return choice({"A": share, "B": 0.95 - share})
    return text(" ".join(WORDS[byte % len(WORDS)] for byte in digest[:12]).capitalize() + ".")


def text(content: str | None, reason: str | None = "stop", tokens: int = 5) -> Reply:
    message = {"role": "assistant", "content": content}
    usage = {"prompt_tokens": 11, "completion_tokens": tokens}
    return Reply(body={"choices": [{"message": message, "finish_reason": reason}], "usage": usage})


def choice(probabilities: dict[str, float], first: str = "A") -> Reply:
    """Answer with log-probabilities of the first token's alternatives."""
    listed = [{"token": token, "logprob": math.log(p)} for token, p in probabilities.items()]
    reply = text(first, "length", 1)
    reply.body["choices"][0]["logprobs"] = {"content": [{"token": first, "logprob": -0.1, "top_logprobs": listed}]}
    return reply


def error(status: int, message: str = "no", **headers: str) -> Reply:
    return Reply(status, {"error": {"message": message}}, {key.replace("_", "-"): v for key, v in headers.items()})


class HostileServer:
    """Serves until its `with` block ends."""

    def __init__(self, behave: Behaviour = words):
        self.behave = behave
        self.asked: list[Asked] = []
        self.most_at_once = self._at_once = 0
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def counts(self) -> Counter[str]:
        """How often each question was asked."""
        return Counter(self._counts)

    def __enter__(self) -> "HostileServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def _take(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Asked:
        with self._lock:
            key = key_of(body)
            asked = Asked(path, headers, body, self._counts[key])
            self._counts[key] += 1
            self.asked.append(asked)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        return asked

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                asked = owner._take(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
                try:
                    self._send(owner.behave(asked))
                finally:
                    with owner._lock:
                        owner._at_once -= 1

            def do_GET(self) -> None:
                """Send how often each question was asked, and forget it; for tests in another process."""
                with owner._lock:
                    counts = dict(owner._counts)
                    owner._counts.clear()
                self._send(Reply(body=counts))

            def _send(self, reply: Reply) -> None:
                if reply.wait:
                    reply.wait.wait(30)
                data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                headers = {"content-type": "application/json", "content-length": str(len(data)), **reply.headers}
                try:
                    self.send_response(reply.status)
                    for key, value in headers.items():
                        self.send_header(key, value)
                    self.end_headers()
                    self.wfile.write(data if reply.cut is None else data[: reply.cut])
                    self.wfile.flush()
                except OSError:  # the client has gone
                    self.close_connection = True
                    return
                if reply.cut is not None:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.close_connection = True

            def finish(self) -> None:
                with suppress(OSError, ValueError):
                    super().finish()

            def handle(self) -> None:
                with suppress(OSError, ValueError):  # a connection that was reset on purpose
                    super().handle()

            def log_message(self, *_: object) -> None:
                pass

        return Handler


if __name__ == "__main__":  # in a process of its own: print the address, and serve until the input ends
    import sys

    with HostileServer() as server:
        print(server.url, flush=True)
        sys.stdin.read()
