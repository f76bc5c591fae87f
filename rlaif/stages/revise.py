"""Stage `revise`: response, critique, revision (Bai et al. 2022, arXiv 2212.08073, section 3).

For each train prompt the base model writes a response. For prompts with a tag in `revise_tags` it then criticizes the
response under a principle of the constitution and rewrites it, `rounds` times; the principle of each step is drawn by a
hash of (seed, prompt id, step). Without `critique` it is rewritten at once. Worked examples are shown as earlier turns
of the chat. Prompts of other tags keep their `helpful_samples` responses as they are (the paper's helpful mix).

Departures: one model plays all parts; a response cut by the token limit is trimmed to its last whole sentence.

Writes ``demonstrations.jsonl``, ``quarantine.jsonl`` (with the reason) and ``chains.jsonl`` (every text).
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlaif import files, filters
from rlaif.constitution import Example, Principle
from rlaif.engines.engine import Answer, Engine, Question, ask
from rlaif.engines.local import LocalEngine
from rlaif.errors import DataError
from rlaif.model.roles import BASE
from rlaif.prompting import Template
from rlaif.recipe import SamplingSection
from rlaif.records import Demonstration, Messages, Prompt, assistant, text_of
from rlaif.sameness import grams, likeness, near_duplicates, says_no_change
from rlaif.stages.run import Run, reconciled, templates

NAME = "revise"
NEAR_DUPLICATE = "near duplicate"  # the reason of a demonstration that is nearly another one
COPIED = "worked example copied"  # the reason of a revision that is nearly one of those that were shown
NO_CHANGE = "no change needed"  # the flag of a demonstration whose critique found nothing to change
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
    sample: int = 0

    @property
    def id(self) -> str:
        """The prompt's id, and the number of the sample after the first."""
        return f"{self.prompt.id}~{self.sample}" if self.sample else self.prompt.id

    @property
    def before(self) -> str:
        """The version that the last step revised."""
        return self.steps[-2].revision if len(self.steps) > 1 else self.response

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
        templates=[template.hash for template in parts(run).values()],
    )


def parts(run: Run) -> dict[str, Template]:
    """Return what a model is asked for in each step, with the template of the request."""
    if run.recipe.revise.critique:
        return templates("critique", "revise")
    return {"revise": templates("revise_directly")["revise_directly"]}


def revise(run: Run) -> dict[str, Any]:
    """Run the stage; return the counts for its manifest."""
    settings = run.recipe.revise
    prompts = run.select("train", settings.prompts_per_tag)
    engine = LocalEngine(run.load_base(), BASE, batch_size=settings.batch_size)
    chains = respond(run, NAME, engine, prompts, settings.sampling)
    harmful = [chain for chain in chains if chain.prompt.tag in settings.revise_tags]
    others = [prompt for prompt in prompts if prompt.tag not in settings.revise_tags]
    for sample in range(1, settings.helpful_samples if others else 1):
        chains += respond(run, NAME, engine, others, settings.sampling, sample=sample)
    for step in range(settings.rounds):
        critique_and_revise(run, NAME, engine, harmful, step)
    return write(run, chains)


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
        Chain(prompt, *whole_sentences(answer), sample=sample) for prompt, answer in zip(prompts, answers, strict=True)
    ]


def critique_and_revise(
    run: Run, stage: str, engine: Engine, chains: Sequence[Chain], step: int, *, tag: str | None = None
) -> None:
    """Add one critique and revision to each chain, under a principle for the prompt's tag (or for `tag`)."""
    settings = run.recipe.revise
    examples = run.constitution.examples[: settings.few_shot]
    for chain in chains:
        principle = run.principle_for(chain.prompt, step, tag=tag or "")
        chain.steps.append(Step(principle))
    # Both waves see the answer as it stood before this step.
    for part, template in parts(run).items():
        shown = [turn for example in examples for turn in worked_example(run, template, example)]
        questions = []
        for chain in chains:
            now = chain.steps[-1]
            values = {"prompt": chain.prompt.prompt, "response": chain.before}
            request = _render(template, now.principle, critique=now.critique, **values)
            messages: Messages = [*shown, {"role": "user", "content": request}]
            key = f"{chain.prompt.id}/{part}-{step}"
            questions.append(question(run, key, messages, settings.sampling))
        answers = ask(run.journal, stage, engine, questions, run.progress, f"{part} {step + 1}")
        for chain, answer in zip(chains, answers, strict=True):
            text, ended = whole_sentences(answer)
            if part == "critique":
                chain.steps[-1].critique = text
            else:
                chain.steps[-1].revision, chain.steps[-1].ended = unquoted(text), ended


def worked_example(run: Run, template: Template, example: Example) -> Messages:
    """Return a worked example of the constitution as a turn of the user and one of the assistant."""
    principle = run.constitution.principle(example.principle)
    values = {"prompt": example.prompt, "response": example.response, "critique": example.critique}
    answer = example.critique if template.name == "critique" else example.revision
    return [{"role": "user", "content": _render(template, principle, **values)}, *assistant(answer)]


def _render(template: Template, principle: Principle, *, critique: str, **values: str) -> str:
    if template.name == "critique":
        return template.render(**values, request=principle.critique_request())
    if template.name == "revise":
        return template.render(**values, critique=critique, request=principle.revision_request())
    built = (  # as `Principle.revision_request` builds it, without the reviewer
        f"Write the answer again so that it follows this principle: {principle.text}\n"
        "Keep what follows it already. If nothing has to change, repeat the answer as it is."
    )
    return template.render(**values, request=principle.revision or built)


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


def needs_no_change(chain: Chain) -> bool:
    """Tell whether the last critique found nothing to change and the reviser, as the constitution asks, left it so."""
    if not chain.steps or not says_no_change(chain.steps[-1].critique):
        return False
    return filters.is_same(chain.text, chain.before)


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
    reason = filters.problem_of(
        last.revision,
        response=chain.before,
        critique=last.critique,
        prompt=chain.prompt.prompt,
        ended=last.ended,
        allow_unchanged=settings.keep_unchanged and needs_no_change(chain),
        wanted=settings.filters,
    )
    if reason is None and chain.prompt.tag in settings.must_refuse_tags and not filters.is_refusal(last.revision):
        return "does not decline"
    if reason is None and settings.near_duplicate is not None:
        own, shown = grams(last.revision), run.constitution.examples[: settings.few_shot]
        if any(likeness(own, grams(example.revision)) >= settings.near_duplicate for example in shown):
            return COPIED
    return reason


def write(run: Run, chains: Sequence[Chain]) -> dict[str, Any]:
    """Sort chains into demonstrations and quarantine, write the stage's files and return the counts."""
    folder = run.stage_folder(NAME)
    hashes = {name: template.hash for name, template in parts(run).items()}
    reasons: dict[str, str | None] = {}
    origin: dict[str, str] = {}
    made: list[Demonstration] = []
    for chain in chains:
        for version in versions(chain, run.recipe.revise.demonstrations):
            row = demonstration(run, version, hashes)
            reasons[row.id] = problem(run, version)
            made.append(row)
            origin[row.id] = chain.id
    if len(origin) < len(made):
        twice = next(row.id for row in made if sum(row.id == other.id for other in made) > 1)
        raise DataError(f"prompts: two of them give a demonstration the id `{twice}`. Write an id without `~`.")
    twins: dict[str, str] = {}
    if run.recipe.revise.near_duplicate is not None:
        texts = [(r.id, f"{text_of(r.prompt)}\n{text_of(r.completion)}") for r in made if reasons[r.id] is None]
        twins = near_duplicates(texts, run.recipe.revise.near_duplicate)
    reasons |= dict.fromkeys(twins, NEAR_DUPLICATE)
    kept = [row for row in made if not reasons[row.id]]
    aside = [
        {**row.model_dump(), "reason": reasons[row.id], "duplicate_of": twins.get(row.id)}
        for row in made
        if reasons[row.id]
    ]
    rows = []
    for chain in chains:
        last = f"{chain.id}-{len(chain.steps)}"
        returned = last in twins and origin[twins[last]] == chain.id  # to a text of its own that is kept
        rows.append(chain_row(chain, None if returned else reasons[last]))
    files.write_jsonl(folder / "demonstrations.jsonl", kept)
    files.write_jsonl(folder / "quarantine.jsonl", aside)
    files.write_jsonl(folder / "chains.jsonl", rows)
    return {
        "prompts": len({chain.prompt.id for chain in chains}),
        "chains": len(rows),
        **reconciled(NAME, len(made), kept=len(kept), quarantined=len(aside), failed=0),
        "quarantined_by_reason": dict(Counter(row["reason"] for row in aside)),
    }


def versions(chain: Chain, which: str) -> list[Chain]:
    """Return a chain as it stood after each of its steps, or only the last; a chain without steps is one version."""
    every = [replace(chain, steps=chain.steps[: n + 1]) for n in range(len(chain.steps))] or [chain]
    return every if which == "all" else every[-1:]


def chain_row(chain: Chain, reason: str | None) -> dict[str, Any]:
    """Return a chain with all its texts as a row."""
    return {
        "id": chain.id,
        "prompt_id": chain.prompt.id,
        "sample": chain.sample,
        "prompt": chain.prompt.prompt,
        "tag": chain.prompt.tag,
        "split": chain.prompt.split,
        "response": chain.response,
        "ended": chain.ended,
        "steps": [
            {
                "principle": s.principle.id,
                "principle_hash": s.principle.hash,
                "title": s.principle.title,
                "critique": s.critique,
                "revision": s.revision,
                "ended": s.ended,
            }
            for s in chain.steps
        ],
        "kept": reason is None,
        "reason": reason,
    }


def demonstration(run: Run, chain: Chain, template_hashes: dict[str, str]) -> Demonstration:
    """Return a chain's latest text as a demonstration that says where it came from."""
    principle = chain.steps[-1].principle if chain.steps else None
    return Demonstration(
        id=f"{chain.id}-{len(chain.steps)}",
        prompt=chain.prompt.messages,
        completion=assistant(chain.text),
        messages=[*chain.prompt.messages, *assistant(chain.text)],
        tag=chain.prompt.tag,
        revisions=[{"text": chain.response}]
        + [{"principle": s.principle.id, "critique": s.critique, "text": s.revision} for s in chain.steps],
        flags=[NO_CHANGE] if needs_no_change(chain) else [],
        provenance={
            "prompt_id": chain.prompt.id,
            "chain_id": chain.id,
            "constitution": f"{run.constitution.name} {run.constitution.version}",
            "constitution_hash": run.constitution.hash_of("principles", "examples"),
            "principle": principle.id if principle else None,
            "principle_hash": principle.hash if principle else None,
            "templates": template_hashes,
            "model": run.recipe.model.model_name_or_path,
            "seed": run.recipe.seed,
        },
    )
