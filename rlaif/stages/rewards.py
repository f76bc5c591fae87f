"""Where PPO's scores come from: the reward model, or a registered function.

A function has TRL's signature, ``f(prompts, completions, **columns) -> list[float | None]``, and is named in a recipe
by its entry point in the group ``rlaif.rewards``; a recipe cannot name arbitrary code.
"""

import math
import re
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

from rlaif.errors import ConfigError, DataError
from rlaif.records import Prompt
from rlaif.stages import shares

GROUP = "rlaif.rewards"
RewardFunction = Callable[..., Sequence[float | None]]
_WORD = re.compile(r"[A-Za-z]+(?:['’][A-Za-z]+)*")
_WITHOUT_WORDS = -10.0  # less than any plain text, so that saying nothing does not pay
_AT_LENGTH = 24  # words; what fewer of them cost, `curt` says


def find_function(name: str, key: str = "ppo.reward_function") -> RewardFunction:
    """Return a registered scoring function.

    Raises:
        ConfigError: no package registers this name, or what it registers cannot be loaded.
    """
    known = {entry.name: entry for entry in entry_points(group=GROUP)}
    rating = " (and `judge`, the judge's rating)" if key == "ppo.reward_function" else ""
    if name not in known:
        raise ConfigError(
            f"{key}: `{name}` is not registered; known: {', '.join(sorted(known)) or 'none'}{rating}. A package "
            f"registers its own under the entry-point group `{GROUP}`."
        )
    try:
        function: RewardFunction = known[name].load()
    except (ImportError, AttributeError) as problem:
        raise ConfigError(
            f"{key}: `{name}` is registered as `{known[name].value}`, which cannot be loaded: {problem}. "
            "Mend or reinstall the package."
        ) from None
    return function


def call_function(
    name: str, function: RewardFunction, prompts: Sequence[str], responses: Sequence[str], **columns: Any
) -> list[float]:
    """Score responses with a function and check what it returns.

    Raises:
        DataError: the wrong number of scores, or one that is not a finite number.
    """

    def ask() -> list[float]:
        scores = _scores(name, function, prompts, responses, **columns)
        return [_finite(name, index, score, columns) for index, score in enumerate(scores)]

    return shares.from_first(ask, len(responses))


def call_where_it_applies(
    name: str, function: RewardFunction, prompts: Sequence[str], responses: Sequence[str], **columns: Any
) -> list[float | None]:
    """Score responses with a function that may return None for some, as TRL allows; other checks are the same."""

    def ask() -> list[float]:
        scores = _scores(name, function, prompts, responses, **columns)
        return [
            math.nan if score is None else _finite(name, index, score, columns) for index, score in enumerate(scores)
        ]

    return [None if math.isnan(number) else number for number in shares.from_first(ask, len(responses))]


def score_rows(
    name: str, function: RewardFunction, rows: Sequence[Prompt], responses: Sequence[str], *, may_skip: bool = False
) -> list[float]:
    """Return a function's score of a response to each prompt, whose `tag` and `id` it is given as columns.

    Args:
        name: of the function, for messages.
        function: what scores.
        rows: the prompts.
        responses: one to each.
        may_skip: whether it may say None, which is returned as NaN.

    Raises:
        DataError: the wrong number of scores, or one that is not a finite number.
    """
    columns = {"tag": [row.tag for row in rows], "id": [row.id for row in rows]}
    call = call_where_it_applies if may_skip else call_function
    found = call(name, function, [row.prompt for row in rows], responses, **columns)
    return [math.nan if score is None else score for score in found]


def _scores(
    name: str, function: RewardFunction, prompts: Sequence[str], responses: Sequence[str], **columns: Any
) -> Sequence[Any]:
    scores = function(prompts=list(prompts), completions=list(responses), **columns)
    if len(scores) != len(responses):
        raise DataError(f"reward function `{name}`: {len(scores)} scores for {len(responses)} responses.")
    return scores


def _finite(name: str, index: int, score: Any, columns: dict[str, Any]) -> float:
    try:
        number = float(score)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        of = f" (of a response to `{columns['id'][index]}`)" if "id" in columns else ""
        raise DataError(
            f"reward function `{name}`: score {index}{of} is {score}; PPO needs a finite number for each row."
        )
    return number


def brief(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
    """Score how briefly a response is written: minus a tenth of its number of words, -10 without words.

    The known reward of ``recipes/known-reward.yaml``: its true value is computable, so an improvement is a fact.
    """
    return [-words / 10 or _WITHOUT_WORDS for words in _words(completions)]


def curt(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
    """Say how curt a response is: the square of what it lacks of 24 words, in tens of words; 0 from 24 words on.

    The known cost of ``recipes/known-cost.yaml``. It is convex, so where its mean is at most ``d``, responses have at
    least ``24 - 10 sqrt(d)`` words on average, and just as many only if all are of one length.
    """
    return [(max(0, _AT_LENGTH - words) / 10) ** 2 for words in _words(completions)]


def _words(texts: Sequence[str]) -> list[int]:
    return [len(_WORD.findall(text)) for text in texts]
