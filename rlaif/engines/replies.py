"""What a server's JSON says: a text, log-probabilities of options, or the letter of a written verdict.

Nothing in a reply is trusted: a shape that is not the documented one, or a number that is none, is a `Trouble`, which
may pass, as answers of a server that is shutting down or of a proxy before it do.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from rlaif.engines.engine import Answer

SURE = 0.9  # a letter without a probability counts as this sure; see docs/decisions.md
_LEAST = -100.0  # servers write a probability of 0 as -inf, -9999 or so
_BLANKS = " \t\r\n\u0120\u010a\u2581"  # the last three: how vocabularies write a space or a line break
_SURROGATE = re.compile("[\ud800-\udfff]")
Clean = Callable[[str], str]


class Trouble(Exception):
    """An attempt that brought no usable answer, while another one may.

    Args:
        what: what happened, in words that may be shown.
        wait: seconds that the server asked to be left alone; None where it said nothing.
    """

    def __init__(self, what: str, wait: float | None = None):
        super().__init__(what)
        self.wait = wait


def parse(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
        Trouble: half a body, bytes that are not UTF-8, another kind of value, NaN, or nesting without end.
    """
    try:
        found = json.loads(body.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise Trouble("its answer is not JSON, or only half of it came") from None
    if not isinstance(found, dict):
        raise Trouble("its answer is JSON, but no object")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def written(reply: dict[str, Any], limit: int, clean: Clean) -> Answer:
    """Return the written text of a reply, and whether it ended by itself.

    Args:
        reply: the server's JSON.
        limit: the most tokens that were allowed.
        clean: takes secrets out of a text.
    """
    choice = first_choice(reply)
    message, reason = choice.get("message"), choice.get("finish_reason")
    text = message.get("content") if isinstance(message, dict) else 0
    if text is None:  # such as a model that spent all its tokens on reasoning that is not shown
        text = ""
    if not isinstance(text, str):
        raise Trouble("its answer holds no text at choices[0].message.content")
    if reason == "abort":
        raise Trouble("it broke off its answer")
    tokens = _count(reply, "completion_tokens")
    ended = reason == "stop" if isinstance(reason, str) else tokens < limit
    return Answer(_SURROGATE.sub("\ufffd", clean(text)), ended, (), tokens)


def chosen(reply: dict[str, Any], options: Sequence[str]) -> Answer | None:
    """Return the log-probabilities of the options as the first token; None where the server sends none at all.

    The spellings of an option that differ only in blanks are added up. An option that is not among the listed tokens
    gets the largest log-probability that it can have, so the difference to a listed one is understated and never made
    up. Where none is listed, the question stays without an answer.
    """
    listed = _listed(first_choice(reply))
    if not listed:
        return None
    sums = dict.fromkeys(options, 0.0)
    for token, logprob in listed:
        option = token.strip(_BLANKS)
        if option in sums:
            sums[option] += math.exp(logprob)
    if not any(sums.values()):
        first = ascii(max(listed, key=lambda pair: pair[1])[0])
        return Answer(error=f"no option is among the {len(listed)} most probable tokens (the first is {first:.20})")
    rest = 1 - math.fsum(math.exp(logprob) for _, logprob in listed)
    bound = max(min(min(logprob for _, logprob in listed), math.log(max(rest, 1e-300))), _LEAST)
    logprobs = tuple(math.log(sums[option]) if sums[option] else bound for option in options)
    return Answer(logprobs=logprobs, tokens=_count(reply, "prompt_tokens"))


def _listed(choice: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the first token's alternatives with their log-probabilities."""
    content = choice["logprobs"].get("content") if isinstance(choice.get("logprobs"), dict) else None
    first = content[0] if isinstance(content, list) and content else None
    rows = first.get("top_logprobs") if isinstance(first, dict) else None
    listed: dict[str, float] = {}
    for row in rows if isinstance(rows, list) else []:
        token, value = (row.get("token"), row.get("logprob")) if isinstance(row, dict) else (None, None)
        if not isinstance(token, str) or isinstance(value, bool) or not isinstance(value, int | float):
            raise Trouble("its log-probabilities have another form than documented")
        if not value <= 1e-3:  # rounding may lift one a little above 0
            raise Trouble(f"it sent {value} as a log-probability")
        listed[token] = min(max(float(value), _LEAST), 0.0)
    return list(listed.items())


def verdict(answer: Answer, options: Sequence[str]) -> Answer:
    """Read the choice in a short text: the last option letter that stands alone.

    A text that was cut may have been about to say something else, so there only one letter may occur.
    """
    letters = "|".join(map(re.escape, options))
    found = re.findall(rf"(?<![^\W_])(?:{letters})(?![^\W_])", answer.text)
    if not found or (not answer.ended and len(set(found)) > 1):
        return Answer(error=f"no verdict can be read in the answer {ascii(answer.text[:40])}", tokens=answer.tokens)
    other = math.log((1 - SURE) / max(len(options) - 1, 1))
    logprobs = tuple(math.log(SURE) if option == found[-1] else other for option in options)
    return Answer(logprobs=logprobs, tokens=answer.tokens, method="verdict")


def complaint(body: bytes, clean: Clean) -> str:
    """Return the message in the body of an error, in one line of at most 300 characters."""
    text = body.decode(errors="replace")
    try:
        found = parse(body)
    except Trouble:
        found = {}
    error = found.get("error", found.get("detail", found.get("message", "")))
    if isinstance(error, dict):
        error = error.get("message", error)
    words = error if isinstance(error, str) and error else json.dumps(error) if error else text
    line = "".join(char if char.isprintable() else " " for char in clean(words))
    return " ".join(line.split())[:300].rstrip(".") or "no message"


def first_choice(reply: dict[str, Any]) -> dict[str, Any]:
    """Return the first of a reply's choices."""
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Trouble("its answer holds no `choices`")
    return choices[0]


def _count(reply: dict[str, Any], name: str) -> int:
    usage = reply.get("usage")
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else 0
