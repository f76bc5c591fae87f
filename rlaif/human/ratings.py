"""Answers rated one by one, and answers put in an order, as other projects write them."""

from typing import NamedTuple

from rlaif.human.answers import answered
from rlaif.human.json_objects import Fields
from rlaif.human.values import number, sign
from rlaif.records import Messages
from rlaif.transcripts import Unusable


class Rated(NamedTuple):
    """What a row says of one answer."""

    prompt: Messages
    response: Messages
    rating: float


class Ranked(NamedTuple):
    """What a row says of several answers; `ranks` are from 1, the best."""

    prompt: Messages
    responses: list[Messages]
    ranks: list[int]


def unpaired(row: Fields) -> Rated:
    """Read TRL's unpaired preference, whose `label` says whether the completion is good, as a rating of 1 or 0."""
    prompt, [response] = answered(row.get("prompt"), [("completion", row.get("completion"))])
    label = sign(row, "label")
    if label is None:
        raise Unusable("label not true or false")
    return Rated(prompt, response, float(label))


def rated(row: Fields) -> Rated:
    """Read one answer and its `rating`, on whatever scale."""
    prompt, [response] = answered(row.get("prompt"), [("response", row.get("response"))])
    rating = number(row, "rating")
    if rating is None:
        raise Unusable("no rating")
    return Rated(prompt, response, rating)


def ranked(row: Fields) -> Ranked:
    """Read several answers, the best first, or in any order with `ranks` beside them."""
    responses = row.get("responses")
    if not isinstance(responses, list) or len(responses) < 2:
        raise Unusable("fewer than two responses")
    prompt, answers = answered(row.get("prompt"), [("response", response) for response in responses])
    ranks = row.get("ranks")
    if ranks is None:
        return Ranked(prompt, answers, list(range(1, len(answers) + 1)))
    whole = isinstance(ranks, list) and all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks)
    if not whole or len(ranks) != len(answers) or min(ranks) != 1:
        raise Unusable("ranks not whole numbers from 1, the best, one for each response")
    return Ranked(prompt, answers, ranks)
