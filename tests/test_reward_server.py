"""The HTTP scorer on real sockets: garbage, slowness, too many connections; and as a process of its own."""

import functools
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
import tiny_rewards

from rlaif import reward_server
from rlaif.reward_server import Server
from rlaif.reward_service import Service
from rlaif.scoring import Scorer

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")

TEXT = "<|start|>user\nHello?<|end|>\n<|start|>assistant\nGood day.<|end|>"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    return tiny_rewards.finished(tmp_path_factory.mktemp("served") / "run", tiny_model)


@pytest.fixture(scope="module")
def scorer(run):
    return Scorer.load(run)


@pytest.fixture
def server(scorer):
    said = []
    server = Server(("127.0.0.1", 0), Service(scorer, name="mine"), said.append)
    server.said = said
    server.serve_forever = functools.partial(server.serve_forever, 0.01)  # looks that often whether to end
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def post(server, path="/get_reward", data=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    body = json.dumps({"query": [TEXT]} if data is None else data)
    connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    result = answer.status, dict(answer.getheaders()), json.loads(answer.read())
    connection.close()
    return result


def raw(server, data, *, close=False):
    """Send bytes and return all that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as connection:
        connection.sendall(data)
        if close:
            connection.shutdown(socket.SHUT_WR)
        found = b""
        while part := connection.recv(65536):
            found += part
    return found


def test_scores_come_over_http_and_nothing_invites_web_pages(server):
    status, headers, found = post(server)
    assert status == 200
    assert len(found["rewards"]) == 1
    assert headers["Content-Type"] == "application/json"
    assert not any(name.lower().startswith("access-control") for name in headers)
    assert "Python" not in headers["Server"]


def test_a_connection_serves_several_requests(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    for _ in range(3):
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["status"]) == (200, "ok")
    connection.close()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"DELETE /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 3\r\n\r\n{}}",
        b"POST /classify HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
def test_garbage_is_answered_with_json_and_the_server_goes_on(server, data):
    found = raw(server, data)
    body = found.rpartition(b"\r\n\r\n")[2]
    assert set(json.loads(body)) == {"error"}
    assert b"Traceback" not in found
    assert post(server)[0] == 200


def test_a_body_that_ends_early_is_dropped(server):
    head = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    assert raw(server, head + b'{"input', close=True) == b""
    assert post(server)[0] == 200


def test_a_request_that_drips_is_cut(server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(reward_server, "READ_SECONDS", 0.2)
        assert raw(server, b"POST /classify HTTP/1.1\r\nHost: localho") == b""
    assert post(server)[0] == 200


def test_more_connections_than_there_is_room_for_are_told_to_come_again(server):
    while server._free.acquire(blocking=False):
        pass
    assert raw(server, b"").startswith(b"HTTP/1.1 503 ")
    server._free.release()
    assert post(server)[0] == 200


def test_an_address_of_another_machine_is_refused_with_what_to_do(rlaif_command, run):
    code, err = rlaif_command("reward", "serve", "--model", str(run), "--host", "203.0.113.1")
    assert code == 2
    assert "--host 203.0.113.1 --port 5000: cannot be listened at" in err


@pytest.fixture
def rlaif_command(monkeypatch, capsys):
    from rlaif import cli

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["rlaif", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr().err

    return command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--api-key-env", "sk-secret-123"], "the name of an environment variable in capital letters"),
        (["--api-key-env", "NO_SUCH_KEY"], "`NO_SUCH_KEY` is not set"),
        (["--ensemble", "best"], "--ensemble: `best` is not known"),
    ],
)
def test_mistakes_in_options_are_told_before_a_model_is_loaded(rlaif_command, words, message):
    code, err = rlaif_command("reward", "serve", "--model", "nowhere", *words)
    assert code == 2
    assert message in err
    assert "sk-secret" not in err


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_process_serves_with_a_key_and_ends_in_peace(run, end):
    words = ["reward", "serve", "--model", str(run), "--port", "0", "--api-key-env", "SCORE_KEY"]
    child = subprocess.Popen(
        [sys.executable, "-c", "from rlaif.cli import main; main()", *words],
        env={**os.environ, "SCORE_KEY": "sesame"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    line = next(line for line in child.stderr if line.startswith("serving"))
    port = int(line.split("127.0.0.1:")[1].split("/")[0])

    class Place:
        server_port = port

    assert post(Place)[0] == 401
    status, _, found = post(Place, Authorization="Bearer sesame")
    assert status == 200
    assert found["rewards"] == found["scores"]
    assert post(Place, "/classify", {"input": "junk"}, Authorization="Bearer sesame")[0] == 400
    child.send_signal(end)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, out) == (0, "")
    assert err.splitlines()[-1] == "stopped"
    assert "sesame" not in err
    assert "Traceback" not in err
