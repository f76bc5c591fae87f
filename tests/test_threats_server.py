"""Servers that attack: bodies without end, false numbers, keys sent back, addresses elsewhere.

`test_server` holds what a server may do wrong without meaning to; `docs/reliability.md` says what each test stands for.
"""

import base64
import gzip
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hostile_server import Asked, HostileServer, Reply, choice, error, text
from scripted import CONSTITUTION, PROMPTS
from test_server import CHOICE, GOOD, QUESTIONS, asked, engine, journal, waited  # noqa: F401
from test_server_stages import make, writes  # noqa: F401

from rlaif.engines.wire import Wire
from rlaif.errors import ConfigError, EngineError
from rlaif.journal import Journal
from rlaif.recipe import load_recipe

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
MEBIBYTE = b" " * (1 << 20)


@contextmanager
def raw_server(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """Serve bytes that no HTTP library would send; a talk ends where its client has gone."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(65536)
            talk(connection)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):  # closed with something unread, a connection is reset
                pass

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    listening.close()


def forever(piece: bytes, head: bytes = HEAD + b"\r\n", pause: float = 0.0) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)
            time.sleep(pause)

    return talk


def packed(encoding: bytes, body: bytes) -> Callable[[socket.socket], None]:
    head = HEAD + b"content-encoding: " + encoding + b"\r\ncontent-length: %d\r\n\r\n" % len(body)
    return lambda connection: connection.sendall(head + body)


def whole(body: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)


ENDLESS = {
    "200 MB and more": (forever(MEBIBYTE), "longer than max_response_bytes"),
    "200 MB that are announced": (
        forever(MEBIBYTE, HEAD + b"content-length: 209715200\r\n\r\n"),
        "longer than max_response_bytes",
    ),
    "200 MB in 200 kB": (packed(b"gzip", gzip.compress(b" " * (200 << 20), 1)), "longer than max_response_bytes"),
    "a body that drips": (forever(b" ", HEAD + b"content-length: 99999\r\n\r\n", 0.02), "no answer within 0.5 seconds"),
    "headers that drip": (forever(b"x-a: b\r\n", b"HTTP/1.1 200 OK\r\n", 0.02), "no answer within 0.5 seconds"),
    "a header without end": (forever(b"b" * 9999, b"HTTP/1.1 200 OK\r\nx-a: "), "ProtocolError|within 0.5 seconds"),
    "hints without end": (forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 9999, 0.1), "within 0.5 seconds|Protocol"),
    "nesting without end": (whole(b"[" * 3_000_000), "not JSON"),
    "an integer without end": (whole(b'{"choices": ' + b"9" * 1_000_000 + b"}"), "not JSON"),
    "a text that is cut in the middle of a letter": (whole('{"choices": "é'.encode()[:-1]), "not JSON"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_reply_without_end_is_given_up_and_no_answer_is_made_of_it(
    name: str,
    journal: Journal,  # noqa: F811
) -> None:
    talk, complaint = ENDLESS[name]
    with raw_server(talk) as url, pytest.raises(EngineError, match=complaint):
        asked(journal, engine(url, timeout_seconds=0.5, max_retries=0), QUESTIONS[:1])
    assert journal.count("revise") == 0


READING = """
import sys
from pathlib import Path
from rlaif.endpoints import Endpoint
from rlaif.engines.engine import Question, ask
from rlaif.engines.server import ServerEngine
from rlaif.errors import EngineError
from rlaif.journal import Journal
from rlaif.progress import Progress
endpoint = Endpoint(model="m", urls=[sys.argv[1]], max_retries=0)
who = ServerEngine("big", endpoint)
def peak():  # getrusage would start from the parent's peak
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
try:
    with Journal(Path("journal.db")) as journal:
        list(ask(journal, "s", who, [Question("p", [{"role": "user", "content": "x"}])], Progress(quiet=True), "t"))
except EngineError:
    print((peak() - before) >> 10)
"""


@pytest.mark.parametrize("name", ["200 MB and more", "200 MB in 200 kB"])
def test_a_reply_of_200_mb_takes_no_more_memory_than_is_allowed_for_one(name: str) -> None:
    with raw_server(ENDLESS[name][0]) as url:
        done = subprocess.run([sys.executable, "-c", READING, url], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100, "mebibytes, of which the client itself takes some"


def with_logprob(value: Any) -> Reply:
    reply = choice({"A": 0.6, "B": 0.3})
    reply.body["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = value
    return Reply(body=json.dumps(reply.body).encode())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 5.0, "0.5", None, True, [1], 10**400], ids=repr)
def test_a_false_log_probability_becomes_no_verdict(value: Any, journal: Journal) -> None:  # noqa: F811
    with HostileServer(lambda asked: with_logprob(value)) as server, pytest.raises(EngineError):
        asked(journal, engine(server, chooses=True, max_retries=0), [CHOICE])
    assert journal.count("revise") == 0


def test_what_a_reply_says_of_itself_does_not_change_whose_answer_it_is(journal: Journal) -> None:  # noqa: F811
    """Ids, indices, roles and models in a reply are not read: an answer belongs to the request it came back on."""

    def swapped(asked: Asked) -> Reply:
        reply = text(f"Answer to {asked.text}.")
        reply.body |= {"id": "p0/response", "model": "another", "object": "list", "created": -1}
        reply.body["choices"][0] |= {"index": 99, "id": "p3/response"}
        reply.body["choices"].append({"message": {"content": "Not this one."}, "index": 0})
        return reply

    with HostileServer(swapped) as server:
        found = asked(journal, engine(server, concurrency=6))
    assert [answer.text for answer in found] == [f"Answer to Say {n}." for n in range(6)]


@pytest.mark.parametrize("status", [200, 201, 204, 299])
def test_an_error_that_calls_itself_a_success_is_no_answer(status: int, journal: Journal) -> None:  # noqa: F811
    bodies = ({"error": {"message": "x"}}, {"choices": [], "error": "x"}, {"detail": "x"}, {"choices": [{"error": 1}]})
    for body in bodies:
        with HostileServer(lambda asked, body=body: Reply(status, body)) as server, pytest.raises(EngineError):
            asked(journal, engine(server, max_retries=0), QUESTIONS[:1])
    assert journal.count("revise") == 0


# --- T9: keys -------------------------------------------------------------------------------------------------------

KEY = 'canary-7f"3a\\9d/52+x=='


def wire(key: str) -> Wire:
    return Wire("big", [], key=key, key_env="K", connections=1, timeout_seconds=1, max_bytes=9)


def test_a_key_is_taken_out_of_texts_in_every_spelling_that_a_server_may_choose() -> None:
    percent = "canary-7f%223a%5C9d%2F52%2Bx%3D%3D"
    for spelling in (KEY, json.dumps(KEY)[1:-1], percent):
        assert wire(KEY).clean(f"You sent Bearer {spelling}!") == "You sent Bearer [key removed]!"
    assert wire("EMPTY").clean("EMPTY") == "EMPTY"


def test_a_key_that_comes_back_as_the_most_probable_token_is_nowhere(
    journal: Journal,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SERVER_KEY", KEY)
    with HostileServer(lambda asked: choice({KEY: 0.9}, first=KEY)) as server:
        (answer,) = asked(journal, engine(server, chooses=True, api_key_env="SERVER_KEY"), [CHOICE])
    assert "no option is among" in answer.error and "canary" not in answer.error
    assert b"canary" not in journal.path.read_bytes()


DEBUGGING = """
import logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
logging.getLogger().setLevel(logging.DEBUG)
from rlaif.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("refusing", [False, True])
def test_a_key_is_nowhere_after_a_whole_run_of_the_command_line_with_all_logs_on(
    refusing: bool, tmp_path: Path
) -> None:
    """A server repeats the key in texts, tokens, errors and headers, in several spellings, or accepts it never."""
    spellings = [KEY, json.dumps(KEY)[1:-1]]

    def echo(asked: Asked) -> Reply:
        shown = asked.headers["authorization"]
        assert shown == f"Bearer {KEY}"
        if refusing:
            reply = error(401, f"no such key: {shown}")
        elif asked.body.get("logprobs") or asked.is_probe:
            reply = choice({"A": 0.5, "B": 0.4, shown: 0.05}) if len(asked.text) % 2 else choice({KEY: 0.9}, first=KEY)
        elif "lock" in asked.text:
            reply = Reply(400, f"<h1>{json.dumps(shown)}</h1>".encode())
        elif "ticket" in asked.text and not asked.before:
            reply = error(503, shown)
        else:
            reply = writes(asked)
            reply.body["choices"][0]["message"]["content"] += f" {shown} {json.dumps(shown)}"
        reply.headers |= {"x-key": shown, "set-cookie": f"key={KEY}", "server": KEY}
        return reply

    (tmp_path / "constitution.yaml").write_text(CONSTITUTION)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    with HostileServer(echo) as server:
        everyone = {"responder": "big", "critic": "big", "reviser": "big", "filters": []}
        recipe = {
            "name": "served", "model": "no/such-model", "output": "run", "constitution": "constitution.yaml",
            "prompts": ["prompts.jsonl"], "stages": ["revise", "label"], "revise": everyone,
            "engines": {"big": {"model": "m", "urls": [server.url], "api_key_env": "SERVER_KEY"}},
            "label": {"method": "revision", "judge": "big"},
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        environment = {**os.environ, "SERVER_KEY": KEY, "PYTHONASYNCIODEBUG": "1"}
        command = [sys.executable, "-c", DEBUGGING, "run", "recipe.yaml"]
        done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
    assert done.returncode == (2 if refusing else 0), done.stderr.decode()
    assert b"DEBUG" in done.stdout and server.asked
    if not refusing:
        assert b"[key removed]" in (tmp_path / "run" / "1-revise" / "chains.jsonl").read_bytes()
        assert (tmp_path / "run" / "report.html").is_file()
    places = {path.name: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    places |= {"stdout": done.stdout, "stderr": done.stderr}
    found = [name for name, data in places.items() for one in spellings if one.encode() in data]
    assert found == []
    assert [name for name, data in places.items() if b"canary" in data] == []


# --- T10: addresses elsewhere ---------------------------------------------------------------------------------------


def test_no_address_that_stands_in_data_or_answers_is_asked(make: Any, tmp_path: Path) -> None:  # noqa: F811
    from rlaif.stages import label, revise

    with HostileServer() as elsewhere:
        link = elsewhere.url

        def answer(asked: Asked) -> Reply:
            reply = choice({"A": 0.6, "B": 0.3}) if asked.body.get("logprobs") else writes(asked)
            if not asked.body.get("logprobs"):
                message = reply.body["choices"][0]["message"]
                message["content"] += f" See {link}/x and ![]({link}/y.png) and <img src='{link}/z'>."
                message |= {"tool_calls": [{"function": {"name": "fetch", "arguments": json.dumps({"url": link})}}]}
            reply.body |= {"next": link, "url": link, "redirect": link, "continuation": link}
            reply.headers |= {
                "location": link, "content-location": link, "refresh": f"0; url={link}",
                "link": f'<{link}>; rel="next"', "alt-svc": f'h2="{link}"',
            }  # fmt: skip
            return reply

        prompts = [{**row, "prompt": f"{row['prompt']} {link}/p"} for row in PROMPTS]
        with HostileServer(answer) as server:
            described = {"big": {"model": "large", "urls": [server.url]}}
            everyone = {"responder": "big", "critic": "big", "reviser": "big"}
            sections = {"engines": described, "revise": everyone, "label": {"method": "revision", "judge": "big"}}
            revise.revise(make(prompts=prompts, **sections))
            assert label.label(make(prompts=prompts, **sections))["comparisons"] > 0
            assert {one.path for one in server.asked} == {"/v1/chat/completions"}
        assert elsewhere.asked == []


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://host/v1", "gopher://host/v1", "data:text/plain,x", "//host/v1", "host:80/v1"),
        *("http:\\\\host/v1", "http://host\\@other/v1", "http://host/v1\r\nx: y", "http://user:pass@host/v1"),
        *(
            "http:///v1",
            "http://host:99999/v1",
            "http://host/v1?key=x",
            "http://host/v1#x",
            "unix:///run/x",
            "http://[::1",
        ),
    ],
)
def test_an_address_that_is_not_plainly_http_is_refused(url: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    engines = {"big": {"model": "m", "urls": [url]}}
    path.write_text(
        json.dumps({"name": "r", "model": "t", "constitution": "harmless", "prompts": ["ordinary"], "engines": engines})
    )
    with pytest.raises(ConfigError, match="engines.big.* urls.0: |engines.big"):
        load_recipe(path)


def test_a_key_in_another_alphabet_is_known_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `docs/reliability.md` says is not covered: a server that wants to store the key can encode it."""
    encoded = base64.b64encode(KEY.encode()).decode()
    assert wire(KEY).clean(encoded) == encoded
