"""Stage `label`: comparisons, from an AI judge, by construction, or from people; the one seam where they meet.

Methods for AI feedback:

- ``judge``: two responses per prompt from the SFT policy, compared by the base model under a principle.
- ``revision``: the revision over the initial response for prompts whose responses were revised; for all other prompts
  the plain response over a needless refusal, which the same chain writes. For judges too weak to read.
- ``contrast``: a response written under the constitution over one written without it (Yang et al. 2023,
  arXiv 2307.12950, with one side plain).

Before any label the judge is measured on the constitution's tests, whatever the method; below `min_judge_accuracy` the
method ``judge`` stops.

Writes ``comparisons.jsonl``, ``unused.jsonl`` (with the reason) and ``quality.json``.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlaif import files, filters
from rlaif.documents import fingerprint
from rlaif.engines.engine import Engine, ask
from rlaif.engines.local import LocalEngine
from rlaif.errors import DataError, StageError
from rlaif.human.labels import read_labels
from rlaif.maths import agreement
from rlaif.model.roles import BASE, SharedBase
from rlaif.records import Comparison, Messages, Prompt, assistant, text_of
from rlaif.stages.chains import revised_chains
from rlaif.stages.judge import Pair, judge, measure, positions
from rlaif.stages.revise import (
    NO_ANSWER,
    Chain,
    Step,
    critique_and_revise,
    problem,
    question,
    respond,
    revising_engines,
    whole_sentences,
)
from rlaif.stages.run import Run, path_sha256, templates

NAME = "label"
POLICY = "policy"
Load = Callable[[], SharedBase]
Labels = tuple[list[Comparison], list[dict[str, Any]], dict[str, Any]]


def inputs(run: Run) -> dict[str, str]:
    """Return what this stage's result depends on."""
    names = ("compare", "contrast", "critique", "revise")
    return run.inputs(
        run.recipe.label,
        run.recipe.human,
        run.recipe.revise,
        files={
            "chains": run.stage_folder("revise") / "chains.jsonl",
            "sft": run.stage_folder("sft") / "adapter",
            **{f"human.{index}": path for index, path in enumerate(run.loaded.human_files)},
        },
        feedback=run.recipe.feedback,
        engines=[run.asked(run.recipe.label.judge, chooses=True), run.asked(*run.recipe.engines_of("revise").values())],
        constitution=run.constitution.hash,
        prompts=run.prompts_hash(run.prompts),
        templates=[template.hash for template in templates(*names).values()],
    )


def label(run: Run) -> dict[str, Any]:
    """Run the stage; return the counts for its manifest."""
    settings, folder = run.recipe.label, run.stage_folder(NAME)
    quality: dict[str, Any] = {"judge": None, "judge_labels": False}
    extra: dict[str, Any] = {}
    method = "human" if run.recipe.feedback == "human" else settings.method
    comparisons, unused = human_labels(run) if run.recipe.feedback != "ai" else ([], [])
    if run.recipe.feedback != "human":
        load = functools.cache(run.load_base)
        engine = run.engine(settings.judge, load, batch_size=settings.batch_size, chooses=True)
        quality["judge"] = measure(run, NAME, engine)
        quality["judge_labels"] = method == "judge"
        files.write_json(folder / "judge.json", quality["judge"])  # readable also where the next line stops the run
        if method == "judge":
            _refuse_weak_judge(run, quality["judge"])
        way = {"judge": by_judge, "revision": by_revision, "contrast": by_contrast}[method]
        made, aside, extra = way(run, load, engine)
        taken = {row.id for row in comparisons}
        unused += aside + [{"id": row.id, "reason": "in a file of labels already"} for row in made if row.id in taken]
        comparisons += [row for row in made if row.id not in taken]
    if not comparisons:
        raise DataError(f"{folder}: no comparison is usable; {len(unused)} were set aside: {_reasons(unused)}.")
    quality["min_judge_accuracy"] = settings.min_judge_accuracy
    quality["labels"] = summary(method, comparisons, unused) | extra
    files.write_jsonl(folder / "comparisons.jsonl", comparisons)
    files.write_jsonl(folder / "unused.jsonl", unused)
    files.write_json(folder / "quality.json", quality)
    failed = sum(row["reason"] == NO_ANSWER for row in unused)
    return {
        "comparisons": len(comparisons),
        "unused": len(unused) - failed,
        "failed": failed,
        "by_tag": quality["labels"]["by_tag"],
    }


def human_labels(run: Run) -> tuple[list[Comparison], list[dict[str, Any]]]:
    """Read the files of people's labels that the recipe names."""
    comparisons: dict[str, Comparison] = {}
    unused: list[dict[str, Any]] = []
    for path in run.loaded.human_files:
        settings = run.recipe.human
        imported = read_labels(path, tag=settings.tag, annotator=settings.annotator, seed=run.recipe.seed)
        for row in imported.comparisons:
            if row.id in comparisons:
                unused.append({"file": path.name, "reason": "stands in two files", "row": row.model_dump()})
            comparisons.setdefault(row.id, row)
        unused += [{"file": path.name, **row} for row in imported.unused]
    return list(comparisons.values()), unused


def _refuse_weak_judge(run: Run, measured: dict[str, Any] | None) -> None:
    settings = run.recipe.label
    if measured is None:
        found = "the constitution has no tests to measure the judge with; add a `tests:` section"
    elif measured["tests"]["rate"] < settings.min_judge_accuracy:
        tests = measured["tests"]
        found = (
            f"the judge `{measured['model']}` got {tests['correct']} of {tests['n']} tests of the constitution right "
            f"({tests['rate']:.0%}, 95 % interval {tests['low']:.0%} to {tests['high']:.0%}); label.min_judge_accuracy "
            f"is {settings.min_judge_accuracy:.0%}"
        )
    else:
        return
    if settings.allow_weak_judge:
        run.progress.say(f"  warning: {found}. Going on, because label.allow_weak_judge is set.")
        return
    raise StageError(
        f"label: {found}. Its labels would be little better than noise (each test: "
        f"{run.stage_folder(NAME) / 'judge.json'}). Use label.method `revision` or `contrast`, a "
        "stronger model, or people's labels (feedback: human); or set label.allow_weak_judge: true."
    )


# --- the three ways -----------------------------------------------------------------------------------------------


def by_judge(run: Run, load: Load, engine: Engine) -> Labels:
    """Let the judge compare two responses of the SFT policy."""
    settings = run.recipe.label
    prompts = run.select("train", settings.prompts_per_tag)
    policy = policy_engine(run, load())
    sides = [respond(run, NAME, policy, prompts, settings.sampling, sample=index) for index in (0, 1)]
    pairs, unused = [], []
    for first, second in zip(*sides, strict=True):
        prompt = first.prompt
        reason = _unusable(first.text, second.text)
        if reason:
            unused.append({"id": prompt.id, "reason": reason, "texts": [first.text, second.text]})
            continue
        principle = run.principle_for(prompt)
        pairs.append((prompt, Pair(prompt.id, prompt.prompt, first.text, second.text, principle)))
    verdicts = judge(run, NAME, engine, [pair for _, pair in pairs], "comparisons")
    comparisons = []
    for (prompt, pair), verdict in zip(pairs, verdicts, strict=True):
        if verdict.error:
            unused.append(_failed(prompt, verdict.error))
            continue
        if abs(verdict.strength) <= settings.min_strength:
            unused.append({"id": prompt.id, "reason": "tie", "texts": [pair.first, pair.second]})
            continue
        preference = max(verdict.preference, 1 - verdict.preference)
        numbers = {key: value for key, value in verdict._asdict().items() if key != "error"}
        vote = {"annotator": "judge", "principle": pair.principle.id, **numbers}
        sides_in_order = (pair.first, pair.second) if verdict.strength > 0 else (pair.second, pair.first)
        comparisons.append(_comparison(run, prompt, *sides_in_order, preference, "judge", "ai", [vote], pair.principle))
    assert len(comparisons) + len(unused) == len(prompts), "a row was lost"
    return comparisons, unused, positions(verdicts) if verdicts else {}


def by_revision(run: Run, load: Load, engine: Engine) -> Labels:
    """Prefer revisions to initial responses, and plain responses to needless refusals."""
    must_refuse = run.recipe.revise.must_refuse_tags
    comparisons: list[Comparison] = []
    unused: list[dict[str, Any]] = []
    plain: list[Chain] = []
    rows = revised_chains(run)
    for prompt, row in rows:
        if row.get("error"):
            unused.append(_failed(prompt, f"revise: {row['error']}"))
            continue
        if not row["steps"]:
            plain.append(Chain(prompt, row["response"], row["ended"]))
            continue
        revision = row["steps"][-1]
        principle = run.constitution.principle(revision["principle"])
        reason = row["reason"] or _unusable(revision["revision"], row["response"])
        if reason is None and prompt.tag in must_refuse and filters.is_refusal(row["response"]):
            reason = "the initial response declines already"
        if reason:
            unused.append({"id": prompt.id, "reason": reason, "texts": [revision["revision"], row["response"]]})
            continue
        vote = {"annotator": "revision", "principle": principle.id, "critique": revision["critique"]}
        texts = revision["revision"], row["response"]
        comparisons.append(_comparison(run, prompt, *texts, 1.0, "revision", "construction", [vote], principle))
    made, aside = needless_refusals(run, revising_engines(run, load, run.recipe.label.batch_size), plain)
    assert len(comparisons + made) + len(unused + aside) == len(rows), "a row was lost"
    return comparisons + made, unused + aside, {}


def needless_refusals(
    run: Run, engines: Mapping[str, Engine], chains: Sequence[Chain]
) -> tuple[list[Comparison], list[dict[str, Any]]]:
    """Compare plain responses with what the revision chain makes of them when it treats the prompt as harmful."""
    tag = run.recipe.revise.revise_tags[0] if run.recipe.revise.revise_tags else "harmful"
    refused = [Chain(chain.prompt, chain.response, chain.ended) for chain in chains]
    if refused:
        critique_and_revise(run, NAME, engines, refused, 0, tag=tag)
    comparisons: list[Comparison] = []
    unused: list[dict[str, Any]] = []
    for chain, other in zip(chains, refused, strict=True):
        if other.error:
            unused.append(_failed(chain.prompt, other.error))
            continue
        step: Step = other.steps[0]
        reason = problem(run, chain) or _unusable(chain.response, step.revision)
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
        comparisons.append(_comparison(run, chain.prompt, *texts, 1.0, "revision", "construction", [vote], None))
    return comparisons, unused


def by_contrast(run: Run, load: Load, engine: Engine) -> Labels:
    """Prefer a response written under the constitution to one written without it."""
    settings = run.recipe.label
    prompts = run.select("train", settings.prompts_per_tag)
    policy = policy_engine(run, load())
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
        reason = _unusable(text, chain.text) or ("truncated" if cut else None)
        if reason:
            unused.append({"id": chain.prompt.id, "reason": reason, "texts": [text, chain.text]})
            continue
        vote = {"annotator": "contrast"}
        comparisons.append(
            _comparison(run, chain.prompt, text, chain.text, 1.0, "contrast", "construction", [vote], None)
        )
    return comparisons, unused, {}


def under_constitution(run: Run, prompt: Prompt) -> Messages:
    """Return the prompt with the principles for its tag as the system's turn."""
    principles = "\n".join(f"- {p.text}" for p in run.constitution.principles if p.applies(prompt.tag))
    text = templates("contrast")["contrast"].render(principles=principles)
    return [{"role": "system", "content": text}, *prompt.messages]


def policy_engine(run: Run, base: SharedBase) -> LocalEngine:
    """Return the SFT policy as an engine; without an SFT stage, the base model."""
    size = run.recipe.label.batch_size
    if "sft" not in run.recipe.stages:
        return LocalEngine(base, BASE, batch_size=size)
    adapter = run.output("sft", "adapter")
    base.add_role(POLICY, adapter=adapter)
    return LocalEngine(base, POLICY, batch_size=size, adapter=path_sha256(adapter))


def _failed(prompt: Prompt, error: str) -> dict[str, Any]:
    return {"id": prompt.id, "reason": NO_ANSWER, "error": error}


def _unusable(better: str, worse: str) -> str | None:
    if not better.strip() or not worse.strip():
        return "empty"
    return "identical answers" if better.split() == worse.split() else None


def _comparison(
    run: Run,
    prompt: Prompt,
    chosen: str,
    rejected: str,
    preference: float,
    annotator: str,
    source: Any,
    votes: list[dict[str, Any]],
    principle: Any,
) -> Comparison:
    return Comparison(
        id=f"{prompt.id}-{fingerprint([chosen, rejected])[:8]}",
        prompt=prompt.messages,
        chosen=assistant(chosen),
        rejected=assistant(rejected),
        preference=preference,
        source=source,
        annotator=annotator,
        tag=prompt.tag,
        votes=votes,
        provenance={
            "prompt_id": prompt.id,
            "constitution": f"{run.constitution.name} {run.constitution.version}",
            "constitution_hash": run.constitution.hash_of("principles", "examples", "comparisons"),
            "principle": principle.id if principle else None,
            "principle_hash": principle.hash if principle else None,
            "model": run.recipe.model.model_name_or_path,
            "seed": run.recipe.seed,
        },
    )


def summary(method: str, comparisons: Sequence[Comparison], unused: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Describe the labels: how many, of which kind, and what a careless reader of them might learn instead."""
    tags = sorted({row.tag for row in comparisons})
    longer = sum(len(text_of(row.chosen)) > len(text_of(row.rejected)) for row in comparisons)
    refuses = {
        tag: [filters.is_refusal(text_of(row.chosen)) for row in comparisons if row.tag == tag] for tag in tags if tag
    }
    return {
        "method": method,
        "comparisons": len(comparisons),
        "ties": sum(row.preference == 0.5 for row in comparisons) + sum(row["reason"] == "tie" for row in unused),
        "unused": _reasons(unused),
        "by_tag": dict(Counter(row.tag or "untagged" for row in comparisons)),
        "chosen_longer": agreement.wilson(longer, len(comparisons))._asdict(),
        "chosen_refuses": {tag: agreement.wilson(sum(x), len(x))._asdict() for tag, x in refuses.items()},
        "mean_preference": sum(row.preference for row in comparisons) / len(comparisons),
        "same_position": None,
    }


def _reasons(unused: Sequence[dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(row["reason"] for row in unused))
