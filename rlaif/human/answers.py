"""A prompt and its answers as conversations, whichever way another project writes them."""

from collections.abc import Sequence
from typing import Any

from rlaif.records import Message, Messages, assistant
from rlaif.transcripts import OPEN_TRANSCRIPT, Unusable, conversation, refuse_odd_turns, transcript


def answered(prompt: Any, answers: Sequence[tuple[str, Any]]) -> tuple[Messages, list[Messages]]:
    """Return a prompt and the last turn of each answer to it, checked.

    Args:
        prompt: a text, a transcript that ends with ``Assistant:``, or a conversation.
        answers: what each is called, and the answer as a text or a conversation, which may repeat the prompt.

    Raises:
        Unusable: an answer is empty, two are alike, or one is no answer to this prompt.
    """
    refuse_empty(answers)
    return checked([(name, _after(prompt, answer)) for name, answer in answers])


def checked(sides: Sequence[tuple[str, Messages]]) -> tuple[Messages, list[Messages]]:
    """Return the turns before the answers and the answers, having checked that they belong together.

    Args:
        sides: what each answer is called, and the whole conversation that it ends.

    Raises:
        Unusable: they do not end with the assistant's turn, follow different prompts, or are empty or alike.
    """
    for _, turns in sides:
        if all(turn["role"] != "assistant" for turn in turns):
            raise Unusable("no assistant turn")
        if turns[-1]["role"] != "assistant":
            raise Unusable("last turn is not the assistant's")
    prompt = sides[0][1][:-1]
    if not all(_same(turns[:-1], prompt) for _, turns in sides):
        raise Unusable("contexts differ")
    refuse_odd_turns(prompt)
    refuse_empty([(name, turns[-1]["content"]) for name, turns in sides])
    texts = [turns[-1]["content"].strip() for _, turns in sides]
    if len(set(texts)) < len(texts):
        raise Unusable("identical answers")
    return prompt, [turns[-1:] for _, turns in sides]


def refuse_empty(answers: Sequence[tuple[str, Any]]) -> None:
    """Check that there is something in every answer.

    Raises:
        Unusable: one is absent, blank or an empty list.
    """
    for name, value in answers:
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            raise Unusable(f"empty {name}")


def user(text: str) -> Message:
    """Return a turn of the user."""
    return {"role": "user", "content": text.strip()}


def _after(prompt: Any, answer: Any) -> Messages:
    """Join a prompt (text, transcript or conversation) and an answer, which may repeat the prompt."""
    if isinstance(prompt, str) and isinstance(answer, str) and OPEN_TRANSCRIPT.match(prompt):
        return transcript(f"{prompt.rstrip()} {answer}")
    before = [user(prompt)] if isinstance(prompt, str) else conversation(prompt)
    after = assistant(answer.strip()) if isinstance(answer, str) else conversation(answer)
    repeated = len(after) > len(before) and _same(after[: len(before)], before)
    return after if repeated else before + after


def _same(some: Messages, others: Messages) -> bool:
    """Compare turns by role and text, whatever white space surrounds the text."""
    plain = ([(turn["role"], turn["content"].strip()) for turn in turns] for turns in (some, others))
    return next(plain) == next(plain)
