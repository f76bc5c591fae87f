"""Stage `label`: comparisons, from AI judges, by construction, or from people; the one seam where they meet.

With `method: judge`: candidates are collected (`candidates`), those whose text tries to steer a judge are set aside
(`rlaif.steering`), the labeller is tested on some of them with their answers exchanged, and then every judge votes on
every pair under its principles (`votes`), pairs of known outcome among them (`quality`). Other methods build their
labels (`construction`).

Before any label the judges are measured on the constitution's tests, whatever the method; below `min_judge_accuracy`
the method ``judge`` stops.

Writes ``comparisons.jsonl``, ``unused.jsonl`` (with the reason) and ``quality.json``; where people gave ratings or
rankings, ``ratings.jsonl`` and ``rankings.jsonl``.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlaif import files, filters, steering
from rlaif.documents import shipped
from rlaif.errors import DataError, StageError
from rlaif.human.labels import count_reasons
from rlaif.human.quality import measure
from rlaif.maths import agreement
from rlaif.records import Comparison, text_of
from rlaif.rounds import LABELS
from rlaif.stages import quality as qualities
from rlaif.stages import safety
from rlaif.stages.candidates import NAME, Candidate, Engines, Unused, collect, comparison
from rlaif.stages.chains import parts, revised_chains
from rlaif.stages.construction import by_contrast, by_revision
from rlaif.stages.gate import kept_policy
from rlaif.stages.people import known_labels, pairs_for_people, people_labels
from rlaif.stages.run import Run, reconciled, templates
from rlaif.stages.verdicts import NO_ANSWER
from rlaif.stages.votes import Ballot, Panel, asked, cast, panel_of, swap_test

STEERS = "tries to steer a judge"


def inputs(run: Run) -> dict[str, str]:
    """Return what this stage's result depends on."""
    apart, later = safety.parts(run), run.round > 1
    names = ("compare", "contrast", "gather", "rate", "weigh", *(safety.WORDINGS if apart else ()))
    measured_with = {"reference": run.loaded.reference, "known": run.loaded.known}
    return run.inputs(
        run.recipe.label,
        run.recipe.human,
        run.recipe.revise,
        files={
            "attacks": shipped("prompts") / "attacks.jsonl",
            "chains": run.stage_folder("revise") / "chains.jsonl",
            "sft": run.stage_folder("sft") / "adapter",
            **{f"human.{index}": path for index, path in enumerate(run.loaded.human_files)},
            **{f"candidates.{index}": path for index, path in enumerate(run.loaded.candidate_files)},
            **{f"adapter.{name}": path for name, path in run.loaded.adapters.items()},
            **kept_policy(run).as_input("policy"),
            **({"labels": run.round_folder / LABELS} if later and pairs_for_people(run) != 0 else {}),
            **{name: path for name, path in measured_with.items() if path},
        },
        feedback=run.recipe.feedback,
        engines=[asked(run), run.asked(*run.recipe.engines_of("revise").values())],
        constitution=run.constitution.hash,
        prompts=run.prompts_hash(run.prompts),
        templates=[one.hash for one in (*templates(*names).values(), *parts(run).values())],
        **({"parts": apart} if apart else {}),
        **({"human_pairs": pairs_for_people(run)} if later else {}),
    )


def label(run: Run) -> dict[str, Any]:
    """Run the stage; return the counts for its manifest."""
    settings, folder = run.recipe.label, run.stage_folder(NAME)
    quality: dict[str, Any] = {"judge": None, "judge_labels": False, "min_judge_accuracy": settings.min_judge_accuracy}
    method = "human" if run.recipe.feedback == "human" else settings.method
    engines = Engines(run)
    people = people_labels(run, engines)
    comparisons, unused = people.comparisons, people.unused
    same_position: dict[str, Any] = {}
    incoming = len(comparisons) + len(unused) + sum(people.more.values())
    if run.recipe.feedback != "human":
        panel = panel_of(run, engines)
        quality |= {"judge": qualities.measure_panel(panel), "judge_labels": method == "judge"}
        files.write_json(folder / "judge.json", quality["judge"])  # readable also where the next line stops the run
        if method == "judge":
            _refuse_weak_judge(run, quality["judge"])
            made, aside, found = by_judge(run, engines, panel, people.asked)
            quality |= found
            incoming += found["candidates"]
            same_position = {key: found["votes"][key] for key in ("same_position", "same_position_choice")}
        else:
            made, aside = {"revision": by_revision, "contrast": by_contrast}[method](run, engines)
            revised = method == "revision" and run.round == 1
            incoming += len(revised_chains(run) if revised else run.select("train", settings.prompts_per_tag))
        taken = {row.id for row in comparisons}
        unused += aside + [{"id": row.id, "reason": "in a file of labels already"} for row in made if row.id in taken]
        comparisons += [row for row in made if row.id not in taken]
    if not comparisons and not people.more:
        raise DataError(f"{folder}: no comparison is usable; {len(unused)} were set aside: {count_reasons(unused)}.")
    if run.loaded.reference is not None:
        known = qualities.reference_rows(run.loaded.reference, comparisons, run.recipe.seed)
        quality["reference"] = qualities.against_people(known)
        if quality["reference"] is None:
            run.progress.say(f"  warning: {run.loaded.reference} holds none of the labelled pairs; nothing to compare.")
    quality["labels"] = summary(method, comparisons, unused) | same_position
    quality["labels"] |= {**people.more, "contradictory": people.contradictory}
    annotators = measure([*comparisons, *people.ratings, *people.rankings], known_labels(run))
    quality["annotators"] = annotators and annotators.row()
    if run.loaded.known and not (annotators and annotators.known):
        run.progress.say(f"  warning: {run.loaded.known} holds none of the labelled pairs; nothing is known of them.")
    failed = sum(row["reason"] == NO_ANSWER for row in unused)
    rows = {"comparisons": len(comparisons), **people.more, "unused": len(unused) - failed, "failed": failed}
    counts = reconciled(NAME, incoming, **rows)
    files.write_jsonl(folder / "comparisons.jsonl", comparisons)
    for name in people.more:
        files.write_jsonl(folder / f"{name}.jsonl", getattr(people, name))
    files.write_jsonl(folder / "unused.jsonl", unused)
    files.write_json(folder / "quality.json", quality)
    return counts | {"by_tag": quality["labels"]["by_tag"]}


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


# --- by judges ----------------------------------------------------------------------------------------------------


def by_judge(
    run: Run, engines: Engines, panel: Panel, without: frozenset[str] = frozenset()
) -> tuple[list[Comparison], Unused, dict[str, Any]]:
    """Let the judges vote on candidates; return the labels, the pairs without one, and how good the labels are.

    `without` are the ids of candidates that people label.
    """
    settings = run.recipe.label
    found, unused = collect(run, engines)
    found = [one for one in found if one.id not in without]
    collected = len(found) + len(unused)
    candidates, flags = _unsteered(run, found, unused)
    if settings.safety:
        candidates = safety.helpful(run, candidates, unused)
    tested = sorted(candidates, key=lambda one: run.seed("swap test", one.id))[: settings.self_test_rows]
    quality: dict[str, Any] = {
        "candidates": collected,
        "swap_test": swap_test(panel, tested, settings.tolerance()) if tested else None,
        "attacks": qualities.try_attacks(run, panel),
    }
    gold = qualities.gold_candidates(run, len(candidates))
    shown = qualities.mixed(run, candidates, gold)
    cast_on = dict(zip([one.id for one in shown], cast(panel, shown, "comparisons"), strict=True))
    ballots = [cast_on[one.id] for one in candidates]
    labelled: list[tuple[Candidate, Comparison]] = []
    preferences: list[float | None] = []
    for one, ballot in zip(candidates, ballots, strict=True):
        reason = ballot.reason if ballot.strength is None else _tie(ballot, settings.min_strength)
        preferences.append(None if reason else ballot.preference)
        if reason:
            row: dict[str, Any] = {"id": one.prompt_id, "reason": NO_ANSWER if ballot.error else reason}
            row |= {"error": ballot.error} if ballot.error else {}
            row |= {"texts": [one.first, one.second], "flags": flags[one.id], "votes": ballot.rows()}
            unused.append(row)
        else:
            labelled.append((one, _labelled(run, panel, one, ballot, flags[one.id])))
    references = [
        (preference, one.reference, one.first, one.second)
        for one, preference in zip(candidates, preferences, strict=True)
        if one.reference is not None
    ]
    quality |= {
        "gold": qualities.gold_result(gold, [cast_on[one.id] for one in gold]),
        "votes": qualities.votes_shown(ballots),
        "flagged": dict(Counter(flag.partition(": ")[2] for one in found for flag in flags[one.id])),
        "reference": qualities.against_people(references),
        "safety": safety.add_safety(run, panel, labelled) if settings.safety else None,
    }
    return [row for _, row in labelled], unused, quality


def _unsteered(run: Run, found: Sequence[Candidate], unused: Unused) -> tuple[list[Candidate], dict[str, list[str]]]:
    """Flag candidates whose text tries to steer a judge, and set them aside before one is asked, if that is wished."""
    flags = {one.id: steering.flags_of_pair(one.prompt, one.first, one.second) for one in found}
    if run.recipe.label.flagged == "keep":
        return list(found), flags
    unused += [
        {"id": one.prompt_id, "reason": STEERS, "flags": flags[one.id], "texts": [one.first, one.second]}
        for one in found
        if flags[one.id]
    ]
    return [one for one in found if not flags[one.id]], flags


def _tie(ballot: Ballot, least: float) -> str:
    return "tie" if ballot.strength is None or abs(ballot.strength) <= least else ""


def _labelled(run: Run, panel: Panel, one: Candidate, ballot: Ballot, flags: list[str]) -> Comparison:
    """Return a candidate as a labelled row; its votes speak of the answer that was called first, as `first` says."""
    assert ballot.preference is not None and ballot.strength is not None
    first = ballot.strength > 0
    answers = (one.first, one.second) if first else (one.second, one.first)
    names = {"first": "chosen" if first else "rejected", "second": "rejected" if first else "chosen"}
    named = [f"{names.get(part, part)}: {flag}" for part, _, flag in (text.partition(": ") for text in flags)]
    principle = one.principles[0] if len(one.principles) == 1 else None
    votes = [row | {"first": names["first"]} for row in ballot.rows()]
    preference = max(ballot.preference, 1 - ballot.preference)
    return comparison(run, one, answers, preference, panel.name, "ai", votes, principle, named)


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
        "unused": count_reasons(unused),
        "by_tag": dict(Counter(row.tag or "untagged" for row in comparisons)),
        "chosen_longer": agreement.wilson(longer, len(comparisons))._asdict() if comparisons else None,
        "chosen_refuses": {tag: agreement.wilson(sum(x), len(x))._asdict() for tag, x in refuses.items()},
        "mean_preference": statistics.fmean(row.preference for row in comparisons) if comparisons else None,
        "same_position": None,
    }
