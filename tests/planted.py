"""Comparisons that were labelled by known rules, and a model that proposes and votes as if it understood rules.

Each answer has marks that only the rules speak of: a polite one says ``please``, one with a source ``[1]``. Rules that
are no reason for any label are proposed as well.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from scripted import ScriptedEngine

from rlaif.engines.engine import Question

POLITE = [
    "The answer is polite to the person.",
    "The answer is polite to people.",
    "1. The answer stays polite to a person!",
    '- "The answer is polite to the person who asks."',
]
SOURCED = [
    "The answer names a source for its claims.",
    "The answer names the source of each claim.",
    "* The answer is one that names sources for claims.",
]
NOISE = ["The answer mentions a colour of the rainbow.", "Answer A is nicer than answer B.", "Sure, here are rules:"]
MARKS = {"polite": "please", "source": "[1]", "colour": "blue"}


def rows(count: int = 160) -> list[dict[str, object]]:
    """Return rows: half are labelled by politeness and half by a source; a colour stands on either side at random."""
    found = []
    for number in range(count):
        mark = "please" if number % 2 else "[1]"
        colours = ["blue", "grey"] if (number // 4) % 2 else ["grey", "blue"]
        found.append(
            {
                "id": f"row-{number}",
                "prompt": f"Question number {number}?",
                "chosen": f"Answer {number}, {mark} and {colours[0]}.",
                "rejected": f"Answer {number}, plain and {colours[1]}.",
            }
        )
    return found


def write_rows(path: Path, count: int = 160) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return path


def propose(question: Question) -> str:
    """Name the rule of the pair in one of its wordings, between two lines that are no reason."""
    text = question.messages[-1]["content"]
    number = int(text.split("Question number ")[1].split("?")[0])
    wordings = POLITE if "please" in text else SOURCED
    return f"{NOISE[2]}\n{wordings[number // 2 % len(wordings)]}\n{NOISE[number % 2]}"


def vote(question: Question, bias: float = 0.8) -> Sequence[float]:
    """Prefer the answer with the mark that the rule speaks of; without one, only the position pulls."""
    text = question.messages[-1]["content"]
    first, rest = text.split("Answer A:")[1].split("Answer B:")
    second, rule = rest.split("]\n\n", 1)
    logit = bias
    for word, mark in MARKS.items():
        if word in rule:
            logit += 2.0 * ((mark in first) - (mark in second))
    return logit / 2 - 1.0, -logit / 2 - 1.0


def engine() -> ScriptedEngine:
    return ScriptedEngine(propose, vote, identity="planted", batch_size=8)
