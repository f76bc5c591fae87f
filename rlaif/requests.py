"""What a model is shown: the requests of a critique, a revision and a comparison, and the worked turns before them.

Stages ask with these; `rlaif constitution show` prints them and `rlaif constitution check` estimates their length.
"""

import hashlib
import itertools

from rlaif.constitution import Constitution
from rlaif.documents import canonical_json
from rlaif.principles import Example, Principle
from rlaif.prompting import Template, load_template
from rlaif.records import Message, Messages, assistant

OPTIONS = ("A", "B")
_LETTERS = "bcdfghjkmnpqrstvwxz"  # no vowels, so that a mark is no word


def fence_of(*texts: str) -> str:
    """Return the mark that stands around each text of a request to a judge: letters that are in none of the texts.

    Whatever an answer holds, it cannot hold the mark that ends it, and so cannot imitate another answer or a question.
    The mark is a hash of the texts in any order: one request has one mark whenever it is built, and both orders of a
    pair have the same. It has four letters, and more where texts hold many such words.
    """
    written, content = [text.casefold() for text in texts], canonical_json(sorted(texts))
    for attempt in itertools.count():
        digest = hashlib.sha256(f"{attempt} {content}".encode()).digest()
        mark = "".join(_LETTERS[byte % len(_LETTERS)] for byte in digest[: 4 + attempt // 8])
        if not any(mark in text for text in written):
            return mark
    raise AssertionError("unreachable")


def revision_request(template: Template, principle: Principle, *, prompt: str, response: str, critique: str) -> str:
    """Return the request for a critique, a revision, or a revision without a critique, whichever the template is of."""
    if template.name == "critique":
        return template.render(prompt=prompt, response=response, request=principle.critique_request())
    if template.name == "revise":
        request = principle.revision_request()
        return template.render(prompt=prompt, response=response, critique=critique, request=request)
    built = (  # as `Principle.revision_request` builds it, without the reviewer
        f"Write the answer again so that it follows this principle: {principle.text}\n"
        "Keep what follows it already. If nothing has to change, repeat the answer as it is."
    )
    return template.render(prompt=prompt, response=response, request=principle.revision or built)


def worked_example(constitution: Constitution, template: Template, example: Example) -> Messages:
    """Return a worked example of the constitution as a turn of the user and one of the assistant."""
    principle = constitution.principle(example.principle)
    request = revision_request(
        template, principle, prompt=example.prompt, response=example.response, critique=example.critique
    )
    answer = example.critique if template.name == "critique" else example.revision
    return [{"role": "user", "content": request}, *assistant(answer)]


def worked_examples(constitution: Constitution, template: Template, few_shot: int) -> Messages:
    """Return the first so many worked examples as turns."""
    shown = constitution.examples[:few_shot]
    return [turn for example in shown for turn in worked_example(constitution, template, example)]


def comparison_request(template: Template, principle: Principle, *, prompt: str, first: str, second: str) -> Message:
    """Return the question which of two answers is better, in the order in which they are shown."""
    question = principle.comparison_question()
    fence = fence_of(prompt, first, second, question)
    text = template.render(prompt=prompt, first=first, second=second, question=question, fence=fence)
    return {"role": "user", "content": text}


def worked_comparisons(constitution: Constitution, template: Template, few_shot: int) -> Messages:
    """Return the first so many worked comparisons as turns.

    Each is put under its own principle: a question about something else would teach the judge to ignore the question.
    """
    turns: Messages = []
    for example in constitution.comparisons[:few_shot]:
        principle = constitution.principle(example.principle)
        turns.append(
            comparison_request(template, principle, prompt=example.prompt, first=example.first, second=example.second)
        )
        turns += assistant(OPTIONS[example.better == "second"])
    return turns


def requests_of(
    constitution: Constitution,
    principle: Principle,
    *,
    prompt: str,
    response: str,
    critique: str,
    other: str,
    examples: int,
    comparisons: int,
) -> dict[str, Messages]:
    """Return the conversations that ask for a critique, a revision and a comparison, by the template's name.

    Args:
        constitution: where the worked turns come from.
        principle: what is asked about.
        prompt: what the person asked.
        response: the answer to criticize, to revise, and to compare as the first.
        critique: what the revision is to mend.
        other: the second answer of the comparison.
        examples: how many worked examples are shown.
        comparisons: how many worked comparisons are shown.
    """
    found: dict[str, Messages] = {}
    for name in ("critique", "revise"):
        template = load_template(name)
        request = revision_request(template, principle, prompt=prompt, response=response, critique=critique)
        found[name] = [*worked_examples(constitution, template, examples), {"role": "user", "content": request}]
    template = load_template("compare")
    question = comparison_request(template, principle, prompt=prompt, first=response, second=other)
    found["compare"] = [*worked_comparisons(constitution, template, comparisons), question]
    return found


def plain_turns(messages: Messages) -> str:
    """Write a conversation as a list of turns, for people."""
    return "\n\n".join(f"--- {turn['role']} ---\n{turn['content']}" for turn in messages)
