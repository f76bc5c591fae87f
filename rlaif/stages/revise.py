"""Stage `revise`: response, critique, revision (Bai et al. 2022, arXiv 2212.08073, section 3).

For each train prompt the base model writes a response. For prompts with a tag in `revise_tags` it then criticizes the
response under a principle of the constitution and rewrites it, `rounds` times; the principle of each step is drawn by a
hash of (seed, prompt id, step). Without `critique` it is rewritten at once. Worked examples are shown as earlier turns
of the chat. Prompts of other tags keep their `helpful_samples` responses as they are (the paper's helpful mix).

Departures: one model plays all parts; a response cut by the token limit is trimmed to its last whole sentence.

Writes ``demonstrations.jsonl``, ``quarantine.jsonl`` (with the reason) and ``chains.jsonl`` (every text).
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlaif.engines.engine import Answer, Engine, Question, ask
from rlaif.model.roles import SharedBase
from rlaif.recipe import SamplingSection
from rlaif.records import Messages, Prompt
from rlaif.requests import revision_request, worked_examples
from rlaif.stages.chains import Chain, Step, parts
from rlaif.stages.demonstrations import write
from rlaif.stages.run import Run

NAME = "revise"
# The number that opens a line of a list is matched as well, so that its full stop ends no sentence.
_SENTENCE_END = re.compile(r"""^[^\S\n]*\d+[.)](?=\s|$)|(?P<end>[.!?]["'”’)\]*]*)(?=\s|$)""", re.MULTILINE)


def inputs(run: Run) -> dict[str, str]:
    """Return what this stage's result depends on."""
    settings = run.recipe.revise
    return run.inputs(
        settings,
        constitution=run.constitution.hash_of("principles", "examples"),
        prompts=run.prompts_hash(run.select("train", settings.prompts_per_tag)),
        templates=[template.hash for template in parts(run).values()],
        engines=run.asked(*run.recipe.engines_of(NAME).values()),
    )


def revise(run: Run) -> dict[str, Any]:
    """Run the stage; return the counts for its manifest."""
    settings = run.recipe.revise
    prompts = run.select("train", settings.prompts_per_tag)
    load = functools.cache(run.load_base)
    responder = run.engine(settings.responder, load, batch_size=settings.batch_size)
    revisers = revising_engines(run, load, settings.batch_size)
    chains = respond(run, NAME, responder, prompts, settings.sampling)
    harmful = [chain for chain in chains if chain.prompt.tag in settings.revise_tags]
    others = [prompt for prompt in prompts if prompt.tag not in settings.revise_tags]
    for sample in range(1, settings.helpful_samples if others else 1):
        chains += respond(run, NAME, responder, others, settings.sampling, sample=sample)
    for step in range(settings.rounds):
        critique_and_revise(run, NAME, revisers, harmful, step)
    return write(run, chains)


def revising_engines(run: Run, load: Callable[[], SharedBase], batch_size: int) -> dict[str, Engine]:
    """Return who answers each request of a step, by what is asked for."""
    names = {"critique": run.recipe.revise.critic, "revise": run.recipe.revise.reviser}
    return {part: run.engine(names[part], load, batch_size=batch_size) for part in parts(run)}


def respond(
    run: Run,
    stage: str,
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: SamplingSection,
    sample: int = 0,
) -> list[Chain]:
    """Let the engine answer each prompt as it stands."""
    questions = [question(run, f"{prompt.id}/response", prompt.messages, sampling, sample=sample) for prompt in prompts]
    answers = ask(run.journal, stage, engine, questions, run.progress, "responses")
    return [
        Chain(prompt, *whole_sentences(answer), sample=sample, error=answer.error)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def critique_and_revise(
    run: Run, stage: str, engines: Mapping[str, Engine], chains: Sequence[Chain], step: int, *, tag: str | None = None
) -> None:
    """Add one critique and revision to each chain, under a principle for the prompt's tag (or for `tag`).

    A chain for which there is no answer keeps its error and the whole steps that it has.
    """
    chains = [chain for chain in chains if not chain.error]
    settings = run.recipe.revise
    for chain in chains:
        principle = run.principle_for(chain.prompt, step, tag=tag or "")
        chain.steps.append(Step(principle))
    # Both waves see the answer as it stood before this step.
    for part, template in parts(run).items():
        shown = worked_examples(run.constitution, template, settings.few_shot)
        questions = []
        for chain in chains:
            now = chain.steps[-1]
            values = {"prompt": chain.prompt.prompt, "response": chain.before}
            request = revision_request(template, now.principle, critique=now.critique, **values)
            messages: Messages = [*shown, {"role": "user", "content": request}]
            key = f"{chain.prompt.id}/{part}-{step}"
            questions.append(question(run, key, messages, settings.sampling))
        answers = ask(run.journal, stage, engines[part], questions, run.progress, f"{part} {step + 1}")
        for chain, answer in zip(chains, answers, strict=True):
            text, ended = whole_sentences(answer)
            if answer.error:
                chain.error = f"{part} {step + 1}: {answer.error}"
                chain.steps.pop()
            elif part == "critique":
                chain.steps[-1].critique = text
            else:
                chain.steps[-1].revision, chain.steps[-1].ended = unquoted(text), ended
        chains = [chain for chain in chains if not chain.error]


def question(run: Run, item_id: str, messages: Messages, sampling: SamplingSection, *, sample: int = 0) -> Question:
    """Return a question to write, with a seed of its own."""
    return Question(
        item_id=item_id,
        messages=messages,
        sample=sample,
        seed=run.seed(item_id, sample),
        **sampling.model_dump(),
    )


def whole_sentences(answer: Answer) -> tuple[str, bool]:
    """Trim a response that the token limit cut to its last whole sentence; tell whether it now ends properly."""
    if answer.ended:
        return answer.text, True
    ends = [match.end() for match in _SENTENCE_END.finditer(answer.text) if match["end"]]
    return (answer.text[: ends[-1]], True) if ends else (answer.text, False)


def unquoted(text: str) -> str:
    """Take off the quotation marks that a small model copies from the way the request shows an answer."""
    inner = text[1:-1]
    return inner.strip() if len(text) > 2 and text[0] == text[-1] == '"' and '"' not in inner else text
