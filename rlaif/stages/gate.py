"""Which policy a round starts from, and the gate at its end that keeps the better of two.

`evaluate` has asked the new policy of a round and the one that was kept before the same held-out prompts. The new one
is dropped only where the 95 % interval of the comparison lies on the wrong side as a whole: a win rate below one half
with the gate `judge`, a mean difference of scores below 0 with `score`. Noise does not drop a policy, and one that
nobody could compare does not become the kept one. Where PPO has a constraint, a policy is also dropped that is shown to
break it and to break it more than the old one.

Writes ``gate.json`` beside the stages of the round, and a copy of the kept adapter to ``policy/`` in the run folder.
Both follow from what `evaluate` wrote, so they are made anew each time and need no manifest.
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from rlaif import files
from rlaif.errors import StageError
from rlaif.maths import agreement
from rlaif.model.roles import BASE
from rlaif.records import read_jsonl
from rlaif.rounds import GATE, LABELS, OPTIMIZERS, Step, gates, round_folder
from rlaif.stages.run import Run, path_sha256

POLICY, KEPT = "policy", "kept"
_COLLAPSE = 0.25  # a win rate against its own start that is far below what a policy made somewhat worse has


class Policy(NamedTuple):
    """A policy of a run: the stage that trained it (`base`: none did), in which round, and its adapter."""

    stage: str
    round: int
    adapter: Path | None

    @property
    def is_first(self) -> bool:
        """Whether it is what the first round began with: SFT's, or the base itself."""
        return self.stage in (BASE, "sft")

    def as_input(self, name: str) -> dict[str, Path]:
        """Return the adapter as an input of a stage; nothing for SFT's, which is one already."""
        return {} if self.is_first or not self.adapter else {name: self.adapter}

    def found(self, run: Run) -> Path | None:
        """Return the adapter.

        Raises:
            StageError: it is not there.
        """
        return self.adapter and run.in_round(self.round).output(self.stage, self.adapter.name)


def first_policy(run: Run) -> Policy:
    """Return the policy that the first round starts from, which is the reference of all rounds."""
    if "sft" not in run.recipe.stages:
        return Policy(BASE, 1, None)
    return Policy("sft", 1, run.stage_folder("sft") / "adapter")


def kept_policy(run: Run) -> Policy:
    """Return what this round's stages start from: what the gate of the round before has kept.

    Raises:
        StageError: the round before has not ended.
    """
    return first_policy(run) if run.round == 1 else after_round(run.in_round(run.round - 1))


def after_round(run: Run) -> Policy:
    """Return the policy that the gate of this round has kept.

    Raises:
        StageError: the round has not ended.
    """
    path = run.round_folder / GATE
    if not path.is_file():
        last = Step(run.round, "evaluate")
        raise StageError(f"{path}: not there yet; it is written at the end of the round, after `{last}`.")
    kept = json.loads(path.read_text(encoding="utf-8"))["kept"]
    if kept["stage"] == BASE:
        return Policy(BASE, 1, None)
    return Policy(kept["stage"], kept["round"], run.folder / kept["adapter"])


def starting_policy(run: Run, stage: str) -> Policy:
    """Return the policy whose weights a stage starts from: for a `ppo` after `rejection` its policy, else the kept one.

    PPO on top of rejection sampling is Llama 2's order (arXiv 2307.09288, section 3.2.3).
    """
    if stage == "ppo" and run.recipe.rejection_first:
        return Policy("rejection", run.round, run.stage_folder("rejection") / "policy")
    return kept_policy(run)


def newest_policy(run: Run, stage: str) -> Policy:
    """Return the policy that was trained last before a stage: by this round's stages before it, else the kept one."""
    before = run.recipe.stages[: run.recipe.stages.index(stage)] if stage in run.recipe.stages else run.recipe.stages
    own = [name for name in before if name in OPTIMIZERS]
    return Policy(own[-1], run.round, run.stage_folder(own[-1]) / "policy") if own else kept_policy(run)


def shadow(run: Run, real: Path, *, changed: bool) -> None:
    """Let a rehearsal of a run in another folder find what a later round begins with.

    Args:
        run: the rehearsal, in the round.
        real: the folder of the run itself.
        changed: whether a stage of an earlier round would run. What its gate would keep is not known then; the new
            policy is supposed.
    """
    run.round_folder.mkdir(exist_ok=True)
    if run.round == 1:
        return
    labels = round_folder(real, run.round) / LABELS
    if labels.is_file():
        files.write_bytes(run.round_folder / LABELS, labels.read_bytes())
    last = run.earlier[-1]
    known = round_folder(real, last.round) / GATE
    if known.is_file() and not changed:
        files.write_bytes(last.round_folder / GATE, known.read_bytes())
    else:
        files.write_json(last.round_folder / GATE, {"kept": named(last, newest_policy(last, "evaluate"))})


# --- the gate -----------------------------------------------------------------------------------------------------


def decide(run: Run) -> dict[str, Any]:
    """Keep the better policy of a round that has been evaluated; return what ``gate.json`` says."""
    new, old = newest_policy(run, "evaluate"), kept_policy(run)
    against = old.stage if old.is_first else KEPT
    measured = {"judge": _by_judge, "score": _by_score}[run.recipe.rounds.gate](run, new.stage, against)
    passes = measured.pop("passes")
    limit = run.recipe.ppo.constraint
    if limit and "ppo" in run.recipe.stages:
        measured["cost"] = cost = _by_cost(run, new.stage, against, limit.threshold)
        passes = cost.pop("passes") and passes
        measured["rule"] += f", or {cost.pop('rule')}"
        measured["reason"] += f"; {cost.pop('reason')}"
    kept = new if passes else old
    result = {
        "round": run.round,
        "gate": run.recipe.rounds.gate,
        **measured,
        "new": named(run, new),
        "old": named(run, old),
        "kept": named(run, kept),
    }
    path = run.round_folder / GATE
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != result:
        files.write_json(path, result)
    if gates(run.folder, run.recipe.rounds.count)[-1] == path:
        _publish(run, kept)
    said = "keeps the new policy" if kept == new else f"keeps the policy of {_place(old)}"
    run.progress.say(f"gate of round {run.round}: {said} ({result['reason']})")
    return result


def withdraw(run: Run) -> None:
    """Remove the gates of this round and of later ones, since a stage of this round is about to run."""
    for number in range(run.round, run.recipe.rounds.count + 1):
        (round_folder(run.folder, number) / GATE).unlink(missing_ok=True)


def _by_judge(run: Run, new: str, old: str) -> dict[str, Any]:
    results = json.loads(run.output("evaluate", "results.json").read_text(encoding="utf-8"))
    row = next(one for one in results["win_rates"] if (one["policy"], one["against"]) == (new, old))
    found = {key: row[key] for key in ("n", "wins", "losses", "ties", "failed", "rate", "low", "high")}
    rule = "dropped where the whole 95 % interval of its win rate lies below 50 %"
    if row["rate"] is None:
        return {"rule": rule, "reason": "the judge compared no pair of answers", **found, "passes": False}
    limit = agreement.shown_below(0.5, row["n"])
    reason = f"it wins {row['rate']:.0%} of {row['n']} comparisons, {row['low']:.0%} to {row['high']:.0%}; "
    reason += f"below {limit:.0%} a policy is dropped" if limit > 0 else "so few that no win rate would drop it"
    if limit < _COLLAPSE:
        collapse = ", which takes a collapse" if limit > 0 else ""
        reason += f"{collapse}: raise evaluate.judge_prompts_per_tag"
    return {"rule": rule, "reason": reason, **found, "dropped_below": limit, "passes": row["high"] >= 0.5}


def _measured(run: Run, key: str, new: str, old: str) -> tuple[list[float], list[float]]:
    """Return a figure of both policies' answers to the prompts that both have it of."""
    found: dict[str, dict[str, float]] = {new: {}, old: {}}
    for _, row in read_jsonl(run.output("evaluate", "responses.jsonl")):
        if row["policy"] in found and row.get(key) is not None:
            found[row["policy"]][row["prompt_id"]] = row[key]
    both = [prompt for prompt in found[new] if prompt in found[old]]
    return [found[new][prompt] for prompt in both], [found[old][prompt] for prompt in both]


def _by_cost(run: Run, new: str, old: str, threshold: float) -> dict[str, Any]:
    own, before = _measured(run, "cost", new, old)
    rule = "where the 95 % intervals of its mean cost and of what this is above the old one's lie above the limit and 0"
    if not own:
        return {"rule": rule, "reason": "no answer has a cost", "n": 0, "threshold": threshold, "passes": True}
    mean = agreement.mean_interval(own)
    more = agreement.paired_bootstrap(own, before)
    shown = mean.low is not None and mean.low > threshold and more.low is not None and more.low > 0
    reason = f"its mean cost is {mean.mean:.2f} where {threshold:g} is allowed, {more.difference:+.2f} to the old one's"
    reason += ", both shown to be more" if shown else ""
    return {
        "rule": rule,
        "reason": reason,
        "n": len(own),
        "threshold": threshold,
        "mean": mean._asdict(),
        "change": more._asdict(),
        "passes": not shown,
    }


def _by_score(run: Run, new: str, old: str) -> dict[str, Any]:
    own, before = _measured(run, "score", new, old)
    rule = "dropped where the whole 95 % interval of its mean score, less the old one's, lies below 0"
    if not own:
        return {"rule": rule, "reason": "no answer has a score", "n": 0, "passes": False}
    found = agreement.paired_bootstrap(own, before)._asdict()
    shown = "which shows nothing" if found["high"] is None else f"{found['low']:+.2f} to {found['high']:+.2f}"
    reason = f"its mean score changed by {found['difference']:+.2f} on {len(own)} prompts, {shown}"
    passes = found["high"] is None or found["high"] >= 0
    return {"rule": rule, "reason": reason, "n": len(own), **found, "passes": passes}


def named(run: Run, policy: Policy) -> dict[str, Any]:
    """Return a policy as ``gate.json`` names it."""
    place = policy.adapter.relative_to(run.folder).as_posix() if policy.adapter else None
    return {"stage": policy.stage, "round": policy.round, "adapter": place}


def _place(policy: Policy) -> str:
    return f"`{policy.stage}`" if policy.is_first else f"`{Step(policy.round, policy.stage)}`"


def _publish(run: Run, kept: Policy) -> None:
    """Let ``policy/`` be a copy of the kept adapter; there is none where the base itself is kept."""
    place = run.folder / POLICY
    if kept.adapter is None:
        files.remove_folder(place)
    elif path_sha256(place) != path_sha256(kept.adapter):
        with files.fresh_folder(place) as fresh:
            shutil.copytree(kept.adapter, fresh, dirs_exist_ok=True)
