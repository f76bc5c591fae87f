"""The server engine against a server that misbehaves in every way a test could think of; see `hostile_server`."""

import email.utils
import logging
import re
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile_server import Asked, Behaviour, HostileServer, Reply, choice, error, text, words
from scripted import Said

from rlaif.endpoints import Endpoint
from rlaif.engines.engine import Answer, Question, ask
from rlaif.engines.server import ServerEngine
from rlaif.engines.wire import LONGEST_WAIT, Place
from rlaif.errors import EngineError
from rlaif.journal import Journal

KEY = "canary-7f3a9d52"
QUESTIONS = [
    Question(f"p{n}/response", [{"role": "user", "content": f"Say {n}"}], max_new_tokens=8, temperature=0.5, seed=n)
    for n in range(6)
]
CHOICE = Question("c/given", [{"role": "user", "content": "A or B?"}], options=("A", "B"))


@pytest.fixture
def journal(tmp_path: Path, no_sync: None) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.db") as opened:
        yield opened


@pytest.fixture(autouse=True)
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No test waits: what would have been waited is written down."""
    seconds: list[float] = []

    async def pause(delay: float) -> None:
        seconds.append(delay)

    monkeypatch.setattr(ServerEngine, "pause", staticmethod(pause))
    return seconds


def engine(*servers: HostileServer | str, say: Any = print, chooses: bool = False, **settings: Any) -> ServerEngine:
    urls = [server if isinstance(server, str) else server.url for server in servers]
    return ServerEngine(
        "big", Endpoint.model_validate({"model": "m", "urls": urls} | settings), say=say, chooses=chooses
    )


def asked(
    journal: Journal, who: ServerEngine, questions: list[Question] = QUESTIONS, said: Said | None = None
) -> list[Answer]:
    return list(ask(journal, "revise", who, questions, said or Said(), "answers"))


def once(wrong: Reply, then: Behaviour = words) -> Behaviour:
    """Answer each question wrongly the first time."""
    return lambda asked: wrong if asked.before == 0 else then(asked)


def failure(journal: Journal, behave: Behaviour, **settings: Any) -> str:
    with HostileServer(behave) as server, pytest.raises(EngineError) as caught:
        asked(journal, engine(server, **settings))
    return str(caught.value).replace(server.url, "URL")


# --- what is asked --------------------------------------------------------------------------------------------------


def test_a_question_is_sent_as_it_is_with_its_seed_and_what_the_recipe_adds(journal: Journal) -> None:
    with HostileServer() as server:
        asked(journal, engine(server, extra_body={"top_k": 3}), [QUESTIONS[1]])
    (one,) = server.asked
    assert one.path == "/v1/chat/completions" and "authorization" not in one.headers
    assert one.body == {
        "model": "m", "messages": [{"role": "user", "content": "Say 1"}], "max_tokens": 8, "temperature": 0.5,
        "top_p": 1.0, "seed": 1, "stream": False, "top_k": 3,
    }  # fmt: skip


def test_a_large_seed_becomes_one_that_every_server_takes(journal: Journal) -> None:
    big = Question("x", QUESTIONS[0].messages, max_new_tokens=1, seed=2**62 + 7)
    with HostileServer() as server:
        asked(journal, engine(server), [big])
    assert server.asked[0].body["seed"] == 7


def test_answers_belong_to_their_questions_in_whatever_order_they_come(journal: Journal) -> None:
    later = threading.Event()

    def last_first(asked: Asked) -> Reply:
        if asked.text == "Say 5":
            later.set()
        return Reply(**{**vars(text(asked.text)), "wait": later})

    with HostileServer(last_first) as server:
        found = asked(journal, engine(server, concurrency=6))
    assert [answer.text for answer in found] == [f"Say {n}" for n in range(6)]
    assert len(server.asked) == 6


def test_no_more_requests_are_under_way_than_the_recipe_allows(journal: Journal) -> None:
    with HostileServer() as server:
        asked(journal, engine(server, concurrency=2))
    assert server.most_at_once <= 2 and len(server.asked) == 6


def test_a_question_is_sent_only_when_all_answers_before_it_were_handed_over(journal: Journal) -> None:
    with HostileServer() as server:
        stream = engine(server, concurrency=2).answers([[question] for question in QUESTIONS])
        seen = 0
        for group in stream:
            assert len(server.asked) <= seen + 2
            seen += len(group)
    assert seen == 6


def test_a_server_that_has_moved_is_not_asked_again(journal: Journal) -> None:
    with HostileServer() as old:
        first = asked(journal, engine(old))
    with HostileServer() as new:
        assert asked(journal, engine(new, concurrency=1, timeout_seconds=9)) == first
        assert new.asked == []
        asked(journal, engine(new, extra_body={"top_k": 1}))
    assert len(new.asked) == 6


def test_addresses_take_turns_and_a_dead_one_is_left_out(journal: Journal) -> None:
    said = Said()
    with HostileServer() as one, HostileServer() as other, HostileServer() as dead:
        asked(journal, engine(one, other, concurrency=1))
        assert (len(one.asked), len(other.asked)) == (3, 3)
        gone = dead.url
    with HostileServer() as one, HostileServer() as other:
        who = engine(gone, one, other, concurrency=1, extra_body={"top_k": 1}, say=said.say)
        assert all(answer.text for answer in asked(journal, who))
        assert len(one.asked) + len(other.asked) == 6
    assert len(said.lines) == 1 and gone in said.lines[0] and "Trying again." in said.lines[0]


def test_an_address_rests_longer_after_each_failure_and_one_burst_counts_once() -> None:
    place, before = Place("u"), time.monotonic()
    place.rest(None)
    place.rest(None)
    assert place.failures == 1 and 0 < place.free_at - before < 60
    place.free_at = 0.0
    place.rest(7.0)
    assert place.failures == 2
    place.works()
    assert (place.failures, place.free_at) == (0, 0.0)


# --- what may pass --------------------------------------------------------------------------------------------------

GOOD = text("Yes.").body
PASSING = {
    "429": error(429),
    "500": error(500),
    "503": Reply(503, b"<h1>busy</h1>", {"content-type": "text/html"}),
    "529": error(529),
    "408": error(408),
    "half a body": Reply(body=GOOD, cut=20),
    "no body": Reply(body=GOOD, cut=0),
    "a length that is not kept": Reply(body=b'{"choices"', headers={"content-length": "10"}),
    "no JSON": Reply(body=b"<html>welcome</html>"),
    "not UTF-8": Reply(body=b'{"choices": "\xff"}'),
    "another content type": Reply(body=GOOD, headers={"content-type": "text/html"}),
    "no choices": Reply(body={"choices": []}),
    "an error with status 200": Reply(body={"error": {"message": "overloaded"}}),
    "NaN": Reply(body=b'{"choices": [NaN]}'),
    "nested without end": Reply(body=b'{"a":' + b"[" * 50_000),
    "a status nobody knows": Reply(299, GOOD),
    "a giant": Reply(body=b" " * 300_000),
    "no HTTP": Reply(status=200, body=GOOD, headers={"content-length": "x"}),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_tried_again(name: str, journal: Journal, waited: list[float]) -> None:
    with HostileServer(once(PASSING[name])) as server:
        found = asked(journal, engine(server, max_response_bytes=200_000, concurrency=3))
    assert [answer.text for answer in found] == [words(one).body["choices"][0]["message"]["content"]
                                                for one in sorted_by_seed(server)]  # fmt: skip
    assert set(server.counts.values()) == {2} and waited


def sorted_by_seed(server: HostileServer) -> list[Asked]:
    return sorted((one for one in server.asked if one.before == 1), key=lambda one: int(one.body["seed"]))


@pytest.mark.parametrize("name", ["503", "half a body", "no JSON"])
def test_what_never_passes_stops_the_run_and_loses_no_answer(name: str, journal: Journal) -> None:
    message = failure(
        journal, lambda asked: PASSING[name] if asked.text == "Say 3" else words(asked), max_retries=2, concurrency=2
    )
    assert message.startswith("engine `big` gave no answer to `p3/response`; attempt 3 of 3 (URL): ")
    assert message.endswith("when the server is well again, run the same command again.")
    stored = journal.count("revise")
    assert stored >= 3
    with HostileServer() as server:
        assert len(asked(journal, engine(server))) == 6
    assert len(server.asked) == 6 - stored


def test_a_server_that_is_not_there_stops_the_run(journal: Journal) -> None:
    with HostileServer() as server:
        url = server.url
    with pytest.raises(EngineError, match="gave no answer to .*; attempt 3 of 3") as caught:
        asked(journal, engine(url, max_retries=2, concurrency=1))
    assert url in str(caught.value)


def test_a_server_that_drips_or_hangs_is_given_up_after_the_timeout(journal: Journal) -> None:
    held = threading.Event()
    hang = Reply(body=GOOD, wait=held)
    with HostileServer(once(hang)) as server:
        found = asked(journal, engine(server, timeout_seconds=0.3), QUESTIONS[:1])
        held.set()
    assert found[0].text and server.asked[-1].before == 1


def test_answers_under_way_are_stored_when_another_question_stops_the_run(journal: Journal) -> None:
    held = threading.Event()

    def behave(asked: Asked) -> Reply:
        if asked.text == "Say 0":
            held.set()
            return error(503)
        return Reply(**{**vars(words(asked)), "wait": held})

    failure(journal, behave, max_retries=0, concurrency=6)
    assert journal.count("revise") == 5


def wait_for(header: str, journal: Journal, waited: list[float]) -> float:
    with HostileServer(once(error(429, retry_after=header))) as server:
        asked(journal, engine(server), QUESTIONS[:1])
    return max(waited)


def test_retry_after_in_seconds_is_obeyed_up_to_a_limit(journal: Journal, waited: list[float]) -> None:
    assert 6.5 < wait_for("7", journal, waited) < 7 * 1.25
    waited.clear()
    with Journal(journal.path.with_name("other.db")) as other:
        assert LONGEST_WAIT - 1 < wait_for("86400", other, waited) <= LONGEST_WAIT * 1.25


def test_retry_after_as_a_date_is_obeyed(journal: Journal, waited: list[float]) -> None:
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 20 < wait_for(date, journal, waited) < 30 * 1.25


@pytest.mark.parametrize("header", ["-5", "soon", "Thu, 01 Jan 1970 00:00:00 GMT", "1e999", ""])
def test_a_retry_after_that_says_nothing_sensible_does_no_harm(
    header: str, journal: Journal, waited: list[float]
) -> None:
    assert wait_for(header, journal, waited) < 2


def test_waits_double_and_are_scattered(journal: Journal, waited: list[float]) -> None:
    failure(journal, lambda asked: error(503), max_retries=5, concurrency=1)
    own = [seconds for seconds in waited if seconds > 0]
    assert all(seconds <= LONGEST_WAIT * 1.25 for seconds in own)
    assert max(own) > 4 * min(own)


# --- what is final --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_request_that_the_server_calls_wrong_is_final_and_stored(status: int, journal: Journal) -> None:
    def behave(asked: Asked) -> Reply:
        return error(status, "context is too long") if asked.text == "Say 2" else words(asked)

    with HostileServer(behave) as server:
        found = asked(journal, engine(server))
        assert found[2] == Answer(error=f"the server refused the request: HTTP {status}: context is too long")
        assert [bool(answer.error) for answer in found].count(True) == 1
        assert asked(journal, engine(server)) == found
    assert [one.text for one in server.asked].count("Say 2") == 1
    assert [one.body["max_tokens"] for one in server.asked if one.is_probe] == [1]
    statuses = {unit.item_id: unit.status for unit in journal.known("revise").values()}
    assert statuses["p2/response"] == "bad_request" and list(statuses.values()).count("ok") == 5
    journal.forget_refused("revise")
    assert journal.count("revise") == 5
    with HostileServer() as server:
        assert asked(journal, engine(server))[2].error == ""
    assert len(server.asked) == 1


@pytest.mark.parametrize("reply", [error(404, "The model `m` does not exist."), error(400, "unknown key"), error(405)])
def test_a_server_that_calls_every_request_wrong_stops_the_run_and_nothing_is_final(
    reply: Reply, journal: Journal
) -> None:
    message = failure(journal, lambda asked: reply, concurrency=2)
    assert re.match(
        r"engine `big` refuses every request: HTTP 40[045]: .* \(URL\)\. Check engines\.big\.model", message
    )
    assert journal.count("revise") == 0


@pytest.mark.parametrize("status", [401, 402, 403])
def test_a_key_that_is_not_accepted_stops_the_run_at_once(
    status: int, journal: Journal, waited: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with HostileServer(lambda asked: error(status, "bad key")) as server:
        with pytest.raises(EngineError, match=r"No key was sent; name the variable .* engines\.big\.api_key_env"):
            asked(journal, engine(server, concurrency=2))
        assert len(server.asked) <= 2 and waited == []
        monkeypatch.setenv("SERVER_KEY", KEY)
        with pytest.raises(EngineError, match="The key came from the environment variable `SERVER_KEY`") as caught:
            asked(journal, engine(server, api_key_env="SERVER_KEY"))
    assert KEY not in str(caught.value) and server.asked[-1].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int, journal: Journal) -> None:
    with HostileServer() as elsewhere:
        reply = Reply(status, b"", {"location": f"{elsewhere.url}/chat/completions"})
        message = failure(journal, lambda asked: reply, concurrency=1)
    assert elsewhere.asked == []
    assert f"HTTP {status}: the server sends on to another address, which is not followed" in message
    assert elsewhere.url not in message


# --- choices --------------------------------------------------------------------------------------------------------


def test_a_choice_is_read_from_the_log_probabilities_of_one_greedy_token(journal: Journal) -> None:
    with HostileServer(lambda asked: choice({"A": 0.6, "B": 0.3})) as server:
        (answer,) = asked(journal, engine(server, chooses=True, top_logprobs=7), [CHOICE])
    body = server.asked[0].body
    assert (body["max_tokens"], body["temperature"], body["logprobs"], body["top_logprobs"]) == (1, 0.0, True, 7)
    assert answer.method == "logprobs" and len(answer.logprobs) == 2


def test_where_log_probabilities_are_missing_a_written_verdict_is_read(journal: Journal) -> None:
    said = Said()
    with HostileServer(lambda asked: text("A")) as server:
        more = [Question(f"c{n}", CHOICE.messages, n, options=("A", "B")) for n in range(3)]
        found = asked(journal, engine(server, chooses=True, concurrency=1, say=said.say), more)
    assert {answer.method for answer in found} == {"verdict"}
    assert [bool(one.body.get("logprobs")) for one in server.asked] == [True, False, False, False]
    assert said.lines == [
        "  engine `big`: the server offers no log-probabilities; the letter of a short written verdict is read instead."
    ]


def test_a_server_that_refuses_the_key_for_log_probabilities_counts_as_one_without(journal: Journal) -> None:
    def behave(asked: Asked) -> Reply:
        return error(400, "logprobs is not supported") if asked.body.get("logprobs") else text("The answer is B")

    with HostileServer(behave) as server:
        (answer,) = asked(journal, engine(server, chooses=True), [CHOICE])
        assert answer.method == "verdict" and answer.logprobs[1] > answer.logprobs[0]
        with pytest.raises(EngineError, match="refuses every request: HTTP 400: logprobs is not supported"):
            asked(journal, engine(server, chooses=True, logprobs="required"), [CHOICE])


def test_log_probabilities_that_are_required_and_missing_stop_the_run_with_advice(journal: Journal) -> None:
    with HostileServer(lambda asked: text("A")) as server, pytest.raises(EngineError) as caught:
        asked(journal, engine(server, chooses=True, logprobs="required"), [CHOICE])
    assert str(caught.value) == (
        "engine `big` sends no log-probabilities, which engines.big.logprobs requires. Use a server that offers them, "
        "such as vLLM, or set `logprobs: auto` to read a written verdict instead."
    )


def test_log_probabilities_that_are_off_are_not_asked_for(journal: Journal) -> None:
    with HostileServer(lambda asked: text("B")) as server:
        (answer,) = asked(journal, engine(server, chooses=True, logprobs="off"), [CHOICE])
    assert answer.method == "verdict" and "logprobs" not in server.asked[0].body


def test_a_verdict_that_cannot_be_read_is_stored_as_no_answer(journal: Journal) -> None:
    with HostileServer(lambda asked: text("I like both.")) as server:
        (answer,) = asked(journal, engine(server, chooses=True, logprobs="off"), [CHOICE])
    assert answer.logprobs == () and answer.error == "no verdict can be read in the answer 'I like both.'"
    assert [unit.status for unit in journal.known("revise").values()] == ["bad_request"]


# --- secrets --------------------------------------------------------------------------------------------------------


def test_a_key_that_the_server_sends_back_is_nowhere(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("SERVER_KEY", KEY)

    def echo(asked: Asked) -> Reply:
        shown = asked.headers["authorization"]
        headers = {"x-echo": shown}
        if asked.text == "Say 0" and not asked.before:
            return Reply(503, {"error": {"message": shown}}, headers)
        if asked.text == "Say 1":
            return Reply(400, shown.encode(), headers)
        if asked.text == "Say 2" and not asked.before:
            return Reply(200, GOOD, {**headers, "content-type": shown})
        return Reply(200, text(f"You sent {shown}.").body, headers)

    said = Said()
    with caplog.at_level(logging.DEBUG), HostileServer(echo) as server:
        found = asked(journal, engine(server, api_key_env="SERVER_KEY", say=said.say), said=said)
        assert all(one.headers["authorization"] == f"Bearer {KEY}" for one in server.asked)
        monkeypatch.setattr(server, "behave", lambda asked: error(401, f"wrong: {KEY}"))
        with pytest.raises(EngineError) as caught:
            asked(journal, engine(server, api_key_env="SERVER_KEY", extra_body={"x": 1}, say=said.say))
    assert found[0].text == "You sent Bearer [key removed]." and "[key removed]" in found[1].error
    shown = [str(caught.value), "".join(traceback.format_exception(caught.value)), caplog.text, *said.lines]
    assert [line for line in shown if KEY in line] == []
    assert [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()] == []


def test_a_placeholder_for_a_key_is_no_secret(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_KEY", "EMPTY")
    with HostileServer(lambda asked: text("The box is EMPTY.")) as server:
        found = asked(journal, engine(server, api_key_env="SERVER_KEY"), QUESTIONS[:1])
    assert found[0].text == "The box is EMPTY."


def test_a_key_that_leaves_the_machine_unencrypted_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_KEY", KEY)
    said = Said()
    for url in ("http://gpu.example/v1", "https://api.example/v1", "http://127.0.0.1:8000/v1"):
        engine(url, api_key_env="SERVER_KEY", say=said.say)
    assert len(said.lines) == 1 and "http://gpu.example/v1 without encryption" in said.lines[0]


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HostileServer() as proxy, HostileServer() as server:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        asked(journal, engine(server))
        assert len(server.asked) == 6 and proxy.asked == []
