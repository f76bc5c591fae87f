"""What becomes of the chains of `revise`: demonstrations, or rows that are set aside with the reason."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlaif import files, filters
from rlaif.errors import DataError
from rlaif.records import Demonstration, assistant, text_of
from rlaif.sameness import grams, likeness, near_duplicates, says_no_change
from rlaif.stages.chains import Chain, chain_row, parts
from rlaif.stages.run import Run, reconciled
from rlaif.stages.verdicts import NO_ANSWER

NAME = "revise"
NEAR_DUPLICATE = "near duplicate"  # the reason of a demonstration that is nearly another one
COPIED = "worked example copied"  # the reason of a revision that is nearly one of those that were shown
NO_CHANGE = "no change needed"  # the flag of a demonstration whose critique found nothing to change


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
    folder, settings = run.stage_folder(NAME), run.recipe.revise
    hashes = {name: template.hash for name, template in parts(run).items()}
    reasons: dict[str, str | None] = {}
    origin: dict[str, str] = {}
    made: list[Demonstration] = []
    failed: list[dict[str, Any]] = []
    for chain in chains:
        whole = versions(chain, settings.demonstrations)
        for number in range(len(whole), due(run, chain)):
            row = demonstration(run, chain, hashes).model_copy(update={"id": f"{chain.id}-failed-{number}"})
            failed.append({**row.model_dump(), "reason": NO_ANSWER, "error": chain.error})
        for version in whole:
            row = demonstration(run, version, hashes)
            reasons[row.id] = problem(run, version)
            made.append(row)
            origin[row.id] = chain.id
    if len(origin) < len(made):
        twice = next(row.id for row in made if sum(row.id == other.id for other in made) > 1)
        raise DataError(f"prompts: two of them give a demonstration the id `{twice}`. Write an id without `~`.")
    twins: dict[str, str] = {}
    if settings.near_duplicate is not None:
        texts = [(r.id, f"{text_of(r.prompt)}\n{text_of(r.completion)}") for r in made if reasons[r.id] is None]
        twins = near_duplicates(texts, settings.near_duplicate)
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
        if chain.error:
            rows.append(chain_row(chain, NO_ANSWER))
            continue
        returned = last in twins and origin[twins[last]] == chain.id  # to a text of its own that is kept
        rows.append(chain_row(chain, None if returned else reasons[last]))
    files.write_jsonl(folder / "demonstrations.jsonl", kept)
    files.write_jsonl(folder / "quarantine.jsonl", aside + failed)
    files.write_jsonl(folder / "chains.jsonl", rows)
    return {
        "prompts": len({chain.prompt.id for chain in chains}),
        "chains": len(rows),
        **reconciled(
            NAME, sum(due(run, one) for one in chains), kept=len(kept), quarantined=len(aside), failed=len(failed)
        ),
        "quarantined_by_reason": dict(Counter(row["reason"] for row in aside)),
    }


def due(run: Run, chain: Chain) -> int:
    """Return how many versions of a chain there should be."""
    settings = run.recipe.revise
    revised = settings.demonstrations == "all" and chain.prompt.tag in settings.revise_tags
    return settings.rounds if revised else 1


def versions(chain: Chain, which: str) -> list[Chain]:
    """Return a chain as it stood after each of its steps, or only the last; a chain without steps is one version.

    Of a chain that broke off, those are the whole steps that it has, and no version is its last.
    """
    if chain.error:
        steps = range(len(chain.steps)) if which == "all" else range(0)
        return [replace(chain, steps=chain.steps[: n + 1]) for n in steps]
    every = [replace(chain, steps=chain.steps[: n + 1]) for n in range(len(chain.steps))] or [chain]
    return every if which == "all" else every[-1:]


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
            "model": run.model_of(run.recipe.revise.reviser if chain.steps else run.recipe.revise.responder),
            "seed": run.recipe.seed,
        },
    )
