"""How long the requests of a constitution are, estimated without a model, for `rlaif constitution check`."""

import math
from collections.abc import Iterator, Sequence

from rlaif.constitution import Constitution, Part, Placed
from rlaif.documents import Problem
from rlaif.principles import Example, JudgeTest, Principle, WorkedComparison
from rlaif.recipe import LabelSection, ReviseSection
from rlaif.records import Messages
from rlaif.requests import requests_of

_TURN_TOKENS = 8  # what a chat template writes around a turn
TEXTS: dict[Part, tuple[str, ...]] = {  # what a model is shown of an entry
    "principles": ("text", "critique", "revision", "comparison"),
    "examples": ("prompt", "response", "critique", "revision"),
    "comparisons": ("prompt", "first", "second", "better"),
    "tests": ("prompt", "better", "worse"),
}


def estimated_tokens(text: str) -> int:
    """Estimate the tokens of a text from its characters and words.

    On the requests of the shipped constitutions it is within a tenth of what SmolLM2's tokenizer counts. A letter
    beyond ASCII is taken for one token, which is too few for that tokenizer and about right for larger ones.
    """
    plain = sum(char.isascii() for char in text)
    return math.ceil(max(plain / 4, 1.3 * len(text.split())) + (len(text) - plain))


def lengths(entries: Sequence[Placed], longest: int, max_tokens: int) -> Iterator[Problem]:
    """Yield principles and tests whose requests may not fit the context, with the default number of worked turns.

    A response, a critique and a revision are taken to be as long as the default of `max_new_tokens`. Where no principle
    fits, the worked turns are at fault, and they are named once.
    """
    room = ReviseSection().sampling.max_new_tokens
    written = {"critique": 2 * room, "revise": 3 * room, "compare": 2 * room}  # what a model writes, and has written
    too_long: list[tuple[Placed, str, int]] = []
    principles = [one for one in entries if isinstance(one.entry, Principle)]
    if not principles:
        return
    whole = _as_one(entries)
    known = {principle.id for principle in whole.principles}
    for placed in entries:
        if isinstance(placed.entry, Principle):
            parts = _requests(whole, placed.entry)
            tokens = {name: _tokens(turns) + longest + written[name] for name, turns in parts.items()}
        elif isinstance(placed.entry, JudgeTest) and placed.entry.principle in {None, *known}:
            test = placed.entry
            compare = _requests(whole, whole.principle(test.principle), test.prompt, test.better, test.worse)["compare"]
            tokens = {"compare": _tokens(compare)}
        else:
            continue
        name, most = max(tokens.items(), key=lambda item: item[1])
        if most > max_tokens:
            too_long.append((placed, name, most))
    worked = {name: _tokens(turns[:-1]) for name, turns in _requests(whole, whole.principles[0]).items()}
    advice = f"(an estimate from characters and words); --max-tokens is {max_tokens}"
    if len(principles) > 1 and len(principles) == sum(placed in principles for placed, _, _ in too_long):
        placed, name, most = max(too_long, key=lambda one: one[2])
        key = "comparisons" if name == "compare" else "examples"
        message = (
            f"{key}: every `{name}` request is too long: up to {most} tokens, {worked[name]} of them for worked turns "
            f"{advice}. Put shorter ones first, show fewer (`few_shot` in the recipe), or use a longer context."
        )
        yield placed.document.problem([key], "too-long", message, "warning")
        too_long = [one for one in too_long if one[0] not in principles]
    for placed, name, most in too_long:
        message = f"its `{name}` request takes about {most} tokens, {worked[name]} of them for worked turns {advice}."
        yield placed.warning("", "too-long", f"{message} Shorten its texts or the worked turns.")


def _as_one(entries: Sequence[Placed]) -> Constitution:
    """Return entries as one constitution, without worked turns of a principle that is not among them."""
    principles = [one.entry for one in entries if isinstance(one.entry, Principle)]
    known = {None, *(principle.id for principle in principles)}
    examples = [one.entry for one in entries if isinstance(one.entry, Example) and one.entry.principle in known]
    comparisons = [
        one.entry for one in entries if isinstance(one.entry, WorkedComparison) and one.entry.principle in known
    ]
    return Constitution.model_construct(
        name="", version="", description="", principles=principles, examples=examples, comparisons=comparisons
    )


def _requests(
    whole: Constitution, principle: Principle, prompt: str = "?", response: str = "?", other: str = "?"
) -> dict[str, Messages]:
    shown = ReviseSection().few_shot, LabelSection().few_shot
    return requests_of(
        whole,
        principle,
        prompt=prompt,
        response=response,
        critique="?",
        other=other,
        examples=shown[0],
        comparisons=shown[1],
    )


def _tokens(turns: Messages) -> int:
    return sum(estimated_tokens(turn["content"]) + _TURN_TOKENS for turn in turns)
