"""Labels that need no judge: a revision over what it revised, an answer under the constitution over a plain one.

- ``revision``: the revision over the initial response for prompts whose responses were revised; for all other prompts
  the plain response over a needless refusal, which the same chain writes. For judges too weak to read.
- ``contrast``: a response written under the constitution over one written without it (Yang et al. 2023,
  arXiv 2307.12950, with one side plain).
"""

from collections.abc import Sequence
from typing import Any

from rlaif import filters
from rlaif.engines.engine import ask
from rlaif.records import Comparison, Messages, Prompt, under_instructions
from rlaif.stages.candidates import NAME, Engines, chains_to_label, comparison, no_answer, unusable
from rlaif.stages.chains import Chain, Step
from rlaif.stages.demonstrations import problem
from rlaif.stages.revise import (
    critique_and_revise,
    question,
    respond,
    revising_engines,
    whole_sentences,
)
from rlaif.stages.run import Run, templates

Labels = tuple[list[Comparison], list[dict[str, Any]]]


def by_revision(run: Run, engines: Engines) -> Labels:
    """Prefer revisions to initial responses, and plain responses to needless refusals."""
    must_refuse = run.recipe.revise.must_refuse_tags
    comparisons: list[Comparison] = []
    unused: list[dict[str, Any]] = []
    plain: list[Chain] = []
    for prompt, row in chains_to_label(run, engines):
        if row.get("error"):
            unused.append(no_answer(prompt, f"revise: {row['error']}"))
            continue
        if not row["steps"]:
            plain.append(Chain(prompt, row["response"], row["ended"]))
            continue
        revision = row["steps"][-1]
        principle = run.constitution.principle(revision["principle"])
        reason = row["reason"] or unusable(revision["revision"], row["response"])
        if reason is None and prompt.tag in must_refuse and filters.is_refusal(row["response"]):
            reason = "the initial response declines already"
        if reason:
            unused.append({"id": prompt.id, "reason": reason, "texts": [revision["revision"], row["response"]]})
            continue
        vote = {"annotator": "revision", "principle": principle.id, "critique": revision["critique"]}
        texts = revision["revision"], row["response"]
        comparisons.append(comparison(run, prompt, texts, 1.0, "revision", "construction", [vote], principle))
    made, aside = needless_refusals(run, engines, plain)
    return comparisons + made, unused + aside


def needless_refusals(
    run: Run, engines: Engines, chains: Sequence[Chain]
) -> tuple[list[Comparison], list[dict[str, Any]]]:
    """Compare plain responses with what the revision chain makes of them when it treats the prompt as harmful."""
    tag = run.recipe.revise.revise_tags[0] if run.recipe.revise.revise_tags else "harmful"
    refused = [Chain(chain.prompt, chain.response, chain.ended) for chain in chains]
    if refused:
        revising = revising_engines(run, engines.load, run.recipe.label.batch_size)
        critique_and_revise(run, NAME, revising, refused, 0, tag=tag)
    comparisons: list[Comparison] = []
    unused: list[dict[str, Any]] = []
    for chain, other in zip(chains, refused, strict=True):
        if other.error:
            unused.append(no_answer(chain.prompt, other.error))
            continue
        step: Step = other.steps[0]
        reason = problem(run, chain) or unusable(chain.response, step.revision)
        if reason is None and not filters.is_refusal(step.revision):
            reason = "no needless refusal was written"
        if reason is None and filters.is_refusal(chain.response):
            reason = "the plain response declines"
        if reason is None and not step.ended and "truncated" in run.recipe.revise.filters:
            reason = "truncated"
        if reason:
            unused.append({"id": chain.prompt.id, "reason": reason, "texts": [chain.response, step.revision]})
            continue
        vote = {"annotator": "revision", "principle": step.principle.id, "critique": step.critique}
        texts = chain.response, step.revision
        comparisons.append(comparison(run, chain.prompt, texts, 1.0, "revision", "construction", [vote], None))
    return comparisons, unused


def by_contrast(run: Run, engines: Engines) -> Labels:
    """Prefer a response written under the constitution to one written without it."""
    settings = run.recipe.label
    prompts = run.select("train", settings.prompts_per_tag)
    policy = engines.policy()
    plain = respond(run, NAME, policy, prompts, settings.sampling)
    questions = [
        question(run, f"{prompt.id}/contrast", under_constitution(run, prompt), settings.sampling) for prompt in prompts
    ]
    answers = ask(run.journal, NAME, policy, questions, run.progress, "responses under the constitution")
    comparisons: list[Comparison] = []
    unused: list[dict[str, Any]] = []
    for chain, answer in zip(plain, answers, strict=True):
        text, ended = whole_sentences(answer)
        cut = "truncated" in run.recipe.revise.filters and not (ended and chain.ended)
        reason = unusable(text, chain.text) or ("truncated" if cut else None)
        if reason:
            unused.append({"id": chain.prompt.id, "reason": reason, "texts": [text, chain.text]})
            continue
        vote = {"annotator": "contrast"}
        comparisons.append(
            comparison(run, chain.prompt, (text, chain.text), 1.0, "contrast", "construction", [vote], None)
        )
    return comparisons, unused


def under_constitution(run: Run, prompt: Prompt) -> Messages:
    """Return the prompt with the principles for its tag as the system's turn."""
    principles = "\n".join(f"- {p.text}" for p in run.constitution.principles if p.applies(prompt.tag))
    text = templates("contrast")["contrast"].render(principles=principles)
    return under_instructions(prompt.messages, text)
