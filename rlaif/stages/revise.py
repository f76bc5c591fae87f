"""Stage `revise`: response, critique, revision (Bai et al. 2022, arXiv 2212.08073, section 3).

For each train prompt the base model writes a response. For prompts with a tag in `revise_tags` it then criticizes the
response under a principle of the constitution and rewrites it, `rounds` times; the principle of each step is drawn by a
hash of (seed, prompt id, step). Worked examples are shown as earlier turns of the chat. Prompts of other tags keep
their response as it is (the paper's helpful mix).

Departures: one model plays all parts; a response cut by the token limit is trimmed to its last whole sentence.

Writes ``demonstrations.jsonl``, ``quarantine.jsonl`` (with the reason) and ``chains.jsonl`` (every text).
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlaif import files, filters
from rlaif.constitution import Principle
from rlaif.engines.engine import Answer, Engine, Question, ask
from rlaif.model.roles import SharedBase
from rlaif.recipe import SamplingSection
from rlaif.records import Demonstration, Messages, Prompt, assistant
from rlaif.requests import revision_request, worked_examples
from rlaif.stages.run import Run, templates
from rlaif.stages.verdicts import NO_ANSWER as NO_ANSWER

NAME = "revise"
# The number that opens a line of a list is matched as well, so that its full stop ends no sentence.
_SENTENCE_END = re.compile(r"""^\s*\d+[.)](?=\s|$)|(?P<end>[.!?]["'”’)\]*]*)(?=\s|$)""", re.MULTILINE)


@dataclass
class Step:
    """One critique and the revision that follows it."""

    principle: Principle
    critique: str = ""
    revision: str = ""
    ended: bool = True


@dataclass
class Chain:
    """A prompt, the response to it and what became of it."""

    prompt: Prompt
    response: str
    ended: bool
    steps: list[Step] = field(default_factory=list)
    error: str = ""  # why it went no further than this

    @property
    def text(self) -> str:
        """The latest version of the answer."""
        return self.steps[-1].revision if self.steps else self.response


def inputs(run: Run) -> dict[str, str]:
    """Return what this stage's result depends on."""
    settings = run.recipe.revise
    return run.inputs(
        settings,
        constitution=run.constitution.hash_of("principles", "examples"),
        prompts=run.prompts_hash(run.select("train", settings.prompts_per_tag)),
        templates=[template.hash for template in templates("critique", "revise").values()],
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
    for step in range(settings.rounds):
        critique_and_revise(run, NAME, revisers, harmful, step)
    return write(run, chains)


def revising_engines(run: Run, load: Callable[[], SharedBase], batch_size: int) -> dict[str, Engine]:
    """Return who answers each request of a step, by the name of its template."""
    names = {"critique": run.recipe.revise.critic, "revise": run.recipe.revise.reviser}
    return {part: run.engine(name, load, batch_size=batch_size) for part, name in names.items()}


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
        Chain(prompt, *whole_sentences(answer), error=answer.error)
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
    prompt_templates = templates("critique", "revise")
    for chain in chains:
        principle = run.principle_for(chain.prompt, step, tag=tag or "")
        chain.steps.append(Step(principle))
    # Both waves see the answer as it stood before this step.
    before = {id(chain): chain.steps[-2].revision if len(chain.steps) > 1 else chain.response for chain in chains}
    for part, template in prompt_templates.items():
        shown = worked_examples(run.constitution, template, settings.few_shot)
        questions = []
        for chain in chains:
            now = chain.steps[-1]
            values = {"prompt": chain.prompt.prompt, "response": before[id(chain)]}
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


def problem(run: Run, chain: Chain) -> str | None:
    """Return why a chain's latest text must not be imitated, or None."""
    settings = run.recipe.revise
    if not chain.steps:
        plain = chain.response
        return filters.problem_of(
            plain,
            response=plain,
            critique="",
            prompt=chain.prompt.prompt,
            ended=chain.ended,
            allow_unchanged=True,
            wanted=settings.filters,
        )
    last = chain.steps[-1]
    before = chain.steps[-2].revision if len(chain.steps) > 1 else chain.response
    reason = filters.problem_of(
        last.revision,
        response=before,
        critique=last.critique,
        prompt=chain.prompt.prompt,
        ended=last.ended,
        wanted=settings.filters,
    )
    if reason is None and chain.prompt.tag in settings.must_refuse_tags and not filters.is_refusal(last.revision):
        return "does not decline"
    return reason


def write(run: Run, chains: Sequence[Chain]) -> dict[str, Any]:
    """Sort chains into demonstrations and quarantine, write the stage's files and return the counts."""
    folder, settings = run.stage_folder(NAME), run.recipe.revise
    hashes = {name: template.hash for name, template in templates("critique", "revise").items()}
    kept: list[Demonstration] = []
    aside: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    wanted = 0
    for whole in chains:
        parts = [
            Chain(whole.prompt, whole.response, whole.ended, whole.steps[: n + 1]) for n in range(len(whole.steps))
        ]
        every = settings.demonstrations == "all"
        due = settings.rounds if every and whole.prompt.tag in settings.revise_tags else 1
        versions = (parts if every else parts[-1:]) or [whole]
        if whole.error:
            versions = parts if every else []
        reason: str | None = None
        for version in versions:
            reason = problem(run, version)
            row = demonstration(run, version, hashes)
            if reason is None:
                kept.append(row)
            else:
                aside.append({**row.model_dump(), "reason": reason})
        wanted += due
        for number in range(len(versions), due):
            row = demonstration(run, whole, hashes).model_copy(update={"id": f"{whole.prompt.id}-failed-{number}"})
            failed.append({**row.model_dump(), "reason": NO_ANSWER, "error": whole.error})
            reason = NO_ANSWER
        rows.append(chain_row(whole, reason))
    assert wanted == len(kept) + len(aside) + len(failed), "a row was lost"
    files.write_jsonl(folder / "demonstrations.jsonl", kept)
    files.write_jsonl(folder / "quarantine.jsonl", aside + failed)
    files.write_jsonl(folder / "chains.jsonl", rows)
    return {
        "prompts": len(chains),
        "chains": len(rows),
        "kept": len(kept),
        "quarantined": len(aside),
        "failed": len(failed),
        "quarantined_by_reason": dict(Counter(row["reason"] for row in aside)),
    }


def chain_row(chain: Chain, reason: str | None) -> dict[str, Any]:
    """Return a chain with all its texts as a row."""
    return {
        "id": f"{chain.prompt.id}",
        "prompt_id": chain.prompt.id,
        "prompt": chain.prompt.prompt,
        "tag": chain.prompt.tag,
        "split": chain.prompt.split,
        "response": chain.response,
        "ended": chain.ended,
        "steps": [
            {
                "principle": s.principle.id,
                "title": s.principle.title,
                "critique": s.critique,
                "revision": s.revision,
                "ended": s.ended,
            }
            for s in chain.steps
        ],
        "kept": reason is None,
        "reason": reason,
        "error": chain.error,
    }


def demonstration(run: Run, chain: Chain, template_hashes: dict[str, str]) -> Demonstration:
    """Return a chain's latest text as a demonstration that says where it came from."""
    principle = chain.steps[-1].principle if chain.steps else None
    return Demonstration(
        id=f"{chain.prompt.id}-{len(chain.steps)}",
        prompt=chain.prompt.messages,
        completion=assistant(chain.text),
        messages=[*chain.prompt.messages, *assistant(chain.text)],
        tag=chain.prompt.tag,
        revisions=[{"text": chain.response}]
        + [{"principle": s.principle.id, "critique": s.critique, "text": s.revision} for s in chain.steps],
        provenance={
            "prompt_id": chain.prompt.id,
            "constitution": f"{run.constitution.name} {run.constitution.version}",
            "constitution_hash": run.constitution.hash_of("principles", "examples"),
            "principle": principle.id if principle else None,
            "principle_hash": principle.hash if principle else None,
            "templates": template_hashes,
            "model": run.model_of(run.recipe.revise.reviser if chain.steps else run.recipe.revise.responder),
            "seed": run.recipe.seed,
        },
    )
