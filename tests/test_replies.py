"""What a server's JSON says, whatever JSON it sends."""

import json
import math
from typing import Any

import pytest
from hostile_server import choice, text
from hypothesis import given
from hypothesis import strategies as st

from rlaif.engines.engine import Answer
from rlaif.engines.replies import SURE, Trouble, chosen, complaint, parse, verdict, written

AB = ("A", "B")
JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "logprobs", "top_logprobs", "token", "logprob", "usage"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def as_is(value: str) -> str:
    return value


def reply(content: Any, reason: str | None = "stop", tokens: int = 5) -> dict[str, Any]:
    return dict(text(content, reason, tokens).body)


# --- texts ----------------------------------------------------------------------------------------------------------


def test_a_text_ends_by_itself_if_the_server_says_so() -> None:
    assert written(reply("Yes."), 8, as_is) == Answer("Yes.", True, (), 5)
    assert written(reply("Ye", "length"), 8, as_is) == Answer("Ye", False, (), 5)
    assert written(reply("Ye", "content_filter"), 8, as_is).ended is False


def test_where_the_server_does_not_say_why_it_ended_the_number_of_tokens_does() -> None:
    assert written(reply("Ye", None, 7), 8, as_is).ended is True
    assert written(reply("Ye", None, 8), 8, as_is).ended is False


def test_no_content_is_an_empty_text_and_half_a_character_is_replaced() -> None:
    assert written(reply(None, "length"), 8, as_is) == Answer("", False, (), 5)
    assert written(reply("a\ud800b"), 8, as_is).text == "a\ufffdb"


def test_a_text_that_the_server_broke_off_is_trouble() -> None:
    with pytest.raises(Trouble, match="broke off"):
        written(reply("Ye", "abort"), 8, as_is)


@pytest.mark.parametrize(
    "body",
    [b"", b'{"a": ', b"[]", b"null", b'{"a": NaN}', b'{"a": -Infinity}', b'"\xff"', b"<html>", b"[" * 100_000],
)
def test_what_is_no_object_of_json_is_trouble(body: bytes) -> None:
    with pytest.raises(Trouble):
        parse(body)


@pytest.mark.parametrize("found", [{}, {"choices": []}, {"choices": ["x"]}, {"choices": [{"message": "x"}]}, reply(7)])
def test_a_reply_without_a_text_is_trouble(found: dict[str, Any]) -> None:
    with pytest.raises(Trouble):
        written(found, 8, as_is)


@given(JSON)
def test_whatever_the_shape_there_is_an_answer_or_trouble(found: Any) -> None:
    try:
        parsed = parse(json.dumps({"choices": [found]}).encode())
        for read in (lambda: written(parsed, 8, as_is), lambda: chosen(parsed, AB)):
            answer = read()
            assert answer is None or all(map(math.isfinite, answer.logprobs))
    except Trouble:
        pass


# --- choices --------------------------------------------------------------------------------------------------------


def logs(*probabilities: float) -> Any:
    return pytest.approx(tuple(map(math.log, probabilities)))


def test_the_spellings_of_an_option_are_added_up() -> None:
    found = choice({"A": 0.3, " A": 0.1, "\u2581B": 0.2, "\u0120B": 0.05, "B\n": 0.05, "An": 0.2, "a": 0.1})
    answer = chosen(found.body, AB)
    assert answer and answer.logprobs == logs(0.4, 0.3) and answer.tokens == 11 and answer.method == "logprobs"


def test_an_option_that_is_not_listed_gets_the_most_that_it_can_have() -> None:
    answer = chosen(choice({"A": 0.8, "The": 0.1, "I": 0.06}).body, AB)
    assert answer and answer.logprobs == logs(0.8, 0.04)  # the rest is less than the least one listed
    answer = chosen(choice({"A": 0.5, "The": 0.1, "I": 0.06}).body, AB)
    assert answer and answer.logprobs == logs(0.5, 0.06)  # here the least one listed is less than the rest
    answer = chosen(choice({"A": 1.0}).body, AB)
    assert answer and answer.logprobs == (0.0, -100.0)


def test_where_no_option_is_listed_there_is_no_verdict() -> None:
    answer = chosen(choice({"The": 0.7, "I": 0.2}).body, AB)
    assert answer and answer.logprobs == () and "no option is among the 2 most probable tokens" in answer.error


def test_a_reply_without_log_probabilities_says_so() -> None:
    for logprobs in (None, {}, {"content": None}, {"content": []}, {"content": [{"top_logprobs": []}]}, 3):
        body = reply("A")
        body["choices"][0]["logprobs"] = logprobs
        assert chosen(body, AB) is None
    assert chosen(reply("A"), AB) is None


@pytest.mark.parametrize("value", [0.5, "x", None, True])
def test_a_log_probability_that_is_none_is_trouble(value: Any) -> None:
    body = choice({"A": 0.5}).body
    body["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = value
    with pytest.raises(Trouble):
        chosen(body, AB)


def test_a_probability_of_zero_is_a_number_all_the_same() -> None:
    body = choice({"A": 0.5, "B": 0.5}).body
    body["choices"][0]["logprobs"]["content"][0]["top_logprobs"][1]["logprob"] = -9999.0
    answer = chosen(body, AB)
    assert answer and answer.logprobs == pytest.approx((math.log(0.5), -100.0))


# --- written verdicts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("A", "A"),
        ("B.", "B"),
        ("The better answer is (B).", "B"),
        ("**A**", "A"),
        ("A is kind, but B is kinder: B", "B"),
        ("Not A. B!", "B"),
        ("Answer_A", "A"),
        ("", ""),
        ("a", ""),
        ("BAD", ""),
        ("Both are fine.", ""),
        ("B2", ""),
    ],
)
def test_the_last_letter_that_stands_alone_is_the_verdict(said: str, letter: str) -> None:
    answer = verdict(Answer(said, tokens=3), AB)
    if letter:
        ours, other = math.log(SURE), math.log(1 - SURE)
        assert answer.logprobs == pytest.approx((ours, other) if letter == "A" else (other, ours))
        assert (answer.method, answer.error, answer.tokens) == ("verdict", "", 3)
    else:
        assert answer.logprobs == () and "no verdict can be read" in answer.error


def test_a_text_that_was_cut_counts_only_if_it_names_one_letter() -> None:
    assert verdict(Answer("A is better since it", ended=False), AB).logprobs
    assert verdict(Answer("A is kind while B", ended=False), AB).error


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"error": {"message": "too\\nlong."}}', "too long"),
        (b'{"error": "plain"}', "plain"),
        (b'{"detail": [{"msg": "x"}]}', '[{"msg": "x"}]'),
        (b'{"message": "m"}', "m"),
        (b"<h1>\x1b[31mBad\x07</h1>", "<h1> [31mBad </h1>"),
        (b"", "no message"),
        (b"x" * 1000, "x" * 300),
    ],
)
def test_the_message_of_an_error_is_one_short_line(body: bytes, expected: str) -> None:
    assert complaint(body, as_is) == expected
