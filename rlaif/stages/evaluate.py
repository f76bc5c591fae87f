"""Stage `evaluate`: the base and the policies of all stages on prompts that nothing was trained on.

For each policy: refusals by tag, the reward score, beside it the independent score and the cost where there are such,
the KL to the reference on its own responses, length; between policies: paired differences of refusal rates and of
mean scores, and win rates by the judges of `label` or by one of its own. Every figure has a 95 % interval.

Writes ``results.json`` and ``responses.jsonl``.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from rlaif import files, filters
from rlaif.engines.engine import Answer, ask
from rlaif.engines.local import LocalEngine
from rlaif.maths import agreement
from rlaif.model import sampling
from rlaif.model.roles import BASE, SharedBase
from rlaif.recipe import OPTIONAL
from rlaif.records import Prompt
from rlaif.rounds import OPTIMIZERS
from rlaif.stages.candidates import Candidate, Engines, of_prompt
from rlaif.stages.composite import composite_inputs
from rlaif.stages.gate import KEPT, kept_policy
from rlaif.stages.judged_reward import reward_inputs
from rlaif.stages.revise import question
from rlaif.stages.reward_model import CALIBRATION
from rlaif.stages.rewards import score_rows
from rlaif.stages.run import Run, path_sha256, templates
from rlaif.stages.scorers import (
    BESIDE,
    MICROBATCH,
    SCORE,
    Scorer,
    beside_inputs,
    combination_input,
    cost_input,
    functions_of,
    scorers_of,
)
from rlaif.stages.votes import asked, cast, judges_of, panel_of, settings_of

NAME = "evaluate"
OWN = (None, "sft")  # adapters of a judge whose weights count already
_SAMPLES_PER_TAG = 5
_NO_PAIRS = {"n": 0, "count": 0.0, "rate": None, "low": None, "high": None}  # where the judge answered nothing


class Response(NamedTuple):
    """One policy's answer to one prompt, measured."""

    prompt: Prompt
    text: str
    ended: bool
    tokens: int
    refused: bool
    score: float | None
    kl: float  # nats, to the reference
    independent_score: float | None = None
    cost: float | None = None  # above 0: unsafe


def adapters(run: Run) -> dict[str, Any]:
    """Return the adapter folder of each policy; the base has none."""
    result: dict[str, Any] = {BASE: None}
    if "sft" in run.recipe.stages:
        result["sft"] = run.output("sft", "adapter")
    kept = kept_policy(run)
    if not kept.is_first:
        result[KEPT] = kept.found(run)
    for stage in run.recipe.stages:  # in the order of training, so that the last one is the run's result
        if stage in OPTIMIZERS:
            result[stage] = run.output(stage, "policy")
    return result


def inputs(run: Run) -> dict[str, str]:
    """Return what this stage's result depends on."""
    settings, label, judges = run.recipe.evaluate, run.recipe.label, judges_of(run, NAME)
    return run.inputs(
        settings,
        files={
            **{f"adapter.{one.adapter}": run.loaded.adapters[one.adapter] for one in judges if one.adapter not in OWN},
            "sft": run.stage_folder("sft") / "adapter",
            "ppo": run.stage_folder("ppo") / "policy",
            "reward": run.stage_folder("reward") / "adapter",
            "reward.calibration": run.stage_folder("reward") / CALIBRATION,
            **{stage: run.stage_folder(stage) / "policy" for stage in OPTIONAL if stage in run.recipe.stages},
            **kept_policy(run).as_input(KEPT),
            **cost_input(run),
        },
        constitution=run.constitution.hash_of("principles", "comparisons"),
        judge=[label.principles, *([asdict(settings_of(label, one)), one.adapter] for one in judges)],
        reward_function=[run.recipe.ppo.reward_function, reward_inputs(run)],
        **composite_inputs(run),
        **combination_input(run),
        **beside_inputs(run),
        prompts=run.prompts_hash(run.select("eval", settings.prompts_per_tag)),
        templates=[one.hash for one in templates("compare", "gather", "rate", "weigh").values()],
        engines=asked(run, NAME),
    )


def evaluate(run: Run) -> dict[str, Any]:
    """Run the stage; return the counts for its manifest."""
    settings, folder = run.recipe.evaluate, run.stage_folder(NAME)
    prompts = run.select("eval", settings.prompts_per_tag)
    base = run.load_base()
    policies = adapters(run)
    for name, adapter in policies.items():
        if adapter is not None:
            base.add_role(name, adapter=adapter)
    scorers = scorers_of(run, base)
    reference = "sft" if "sft" in policies else BASE
    responses = {
        name: respond_as(run, base, name, adapter, prompts, reference, scorers) for name, adapter in policies.items()
    }
    wins = win_rates(run, base, responses) if settings.judge_prompts_per_tag else []
    result = {
        "policies": list(policies),
        "reference": reference,
        "prompts": dict(Counter(prompt.tag for prompt in prompts)),
        "metrics": {name: metrics(rows) for name, rows in responses.items()},
        "differences": differences(responses),
        "win_rates": wins,
        "samples": samples(responses),
    }
    files.write_json(folder / "results.json", result)
    files.write_jsonl(
        folder / "responses.jsonl",
        [
            {
                "id": f"{row.prompt.id}/{name}",
                "policy": name,
                "prompt_id": row.prompt.id,
                "tag": row.prompt.tag,
                "prompt": row.prompt.prompt,
            }
            | {key: value for key in Response._fields[1:] if (value := getattr(row, key)) is not None or key == SCORE}
            for name, rows in responses.items()
            for row in rows
        ],
    )
    return {
        "prompts": len(prompts),
        "policies": len(policies),
        "responses": sum(map(len, responses.values())),
        "failed": sum(row["failed"] for row in wins),
    }


def rehearse(run: Run) -> None:
    """Ask what `evaluate` asks, and score nothing."""
    settings = run.recipe.evaluate
    prompts = run.select("eval", settings.prompts_per_tag)
    base = run.load_base()
    responses = {}
    for name, adapter in adapters(run).items():
        answers = answers_as(run, base, name, adapter, prompts)
        responses[name] = [
            Response(prompt, answer.text, answer.ended, answer.tokens, False, None, 0.0)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    if settings.judge_prompts_per_tag:
        win_rates(run, base, responses)


def answers_as(run: Run, base: SharedBase, role: str, adapter: Any, prompts: Sequence[Prompt]) -> list[Answer]:
    """Let one policy answer all prompts."""
    settings = run.recipe.evaluate
    identity = path_sha256(adapter) if adapter is not None else ""
    engine = LocalEngine(base, role, batch_size=settings.batch_size, adapter=identity)
    # With the seeds of the first round in all rounds, policies that have been asked before need not be asked again.
    first = run.in_round(1)
    questions = [question(first, f"{prompt.id}/eval", prompt.messages, settings.sampling) for prompt in prompts]
    return list(ask(run.journal, NAME, engine, questions, run.progress, f"responses of {role}"))


def respond_as(
    run: Run,
    base: SharedBase,
    role: str,
    adapter: Any,
    prompts: Sequence[Prompt],
    reference: str,
    scorers: dict[str, Scorer],
) -> list[Response]:
    """Let one policy answer all prompts, and measure its answers."""
    answers = answers_as(run, base, role, adapter, prompts)
    texts = [answer.text for answer in answers]
    encoded = [
        (base.tokenizer.prompt(prompt.messages), base.tokenizer.response(answer.text, ended=answer.ended))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    measured = measure(run, base, role, reference, prompts, texts, encoded, scorers)
    return [
        Response(prompt, answer.text, answer.ended, answer.tokens, filters.is_refusal(answer.text), **numbers)
        for prompt, answer, numbers in zip(prompts, answers, measured, strict=True)
    ]


@torch.no_grad()
def measure(
    run: Run,
    base: SharedBase,
    role: str,
    reference: str,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    encoded: Sequence[tuple[list[int], list[int]]],
    scorers: dict[str, Scorer],
) -> list[dict[str, Any]]:
    """Return each response's numbers: its log-ratio to the reference, its score (None without a reward), and others."""
    measured: list[dict[str, Any]] = [{"score": None, "kl": 0.0} for _ in texts]
    for key, (name, function) in functions_of(run, base).items():
        for row, value in enumerate(score_rows(name, function, prompts, texts)):
            measured[row][key] = value
    with run.progress.task(f"scores of {role}", len(texts)) as task:
        for rows in sampling.batches_by_length([len(p) + len(r) for p, r in encoded], MICROBATCH):
            pairs = [(encoded[row][0], encoded[row][1] or [base.tokenizer.end_of_turn]) for row in rows]
            batch = sampling.pack(base, *zip(*pairs, strict=True))
            numbers = {
                key: scorer([prompts[row] for row in rows], [texts[row] for row in rows], batch)
                for key, scorer in scorers.items()
            }
            if role != reference:
                numbers["kl"] = response_logprob(base, role, batch) - response_logprob(base, reference, batch)
            for key, values in numbers.items():
                for row, value in zip(rows, values.tolist(), strict=True):
                    measured[row][key] = value
            task.advance(len(rows))
    return measured


def response_logprob(base: SharedBase, role: str, batch: sampling.Batch) -> torch.Tensor:
    """Return the log-probability of each whole response under a role at temperature 1, ``[B]``."""
    with base.acting_as(role):
        return sampling.response_logprobs(base, batch)


def metrics(rows: Sequence[Response]) -> dict[str, Any]:
    """Return one policy's figures with intervals."""
    tags = sorted({row.prompt.tag for row in rows})
    by_tag = {tag: [row for row in rows if row.prompt.tag == tag] for tag in tags}
    return {
        "refusal": {tag: rate([row.refused for row in group]) for tag, group in by_tag.items()},
        "score": means({"all": rows, **by_tag}, "score"),
        **{key: found for key in BESIDE if (found := means({"all": rows, **by_tag}, key))},
        **unsafe({"all": rows, **by_tag}),
        "kl_to_reference": agreement.mean_interval([row.kl for row in rows])._asdict(),
        "response_tokens": agreement.mean_interval([float(row.tokens) for row in rows])._asdict(),
        "ended": rate([row.ended for row in rows]),
    }


def means(groups: dict[str, Sequence[Response]], key: str) -> dict[str, Any] | None:
    """Return the mean of a number over each group of responses, with its interval; None where they do not have it."""
    values = {tag: [getattr(row, key) for row in group] for tag, group in groups.items()}
    if None in values["all"]:
        return None
    return {tag: agreement.mean_interval(numbers)._asdict() for tag, numbers in values.items()}


def unsafe(groups: dict[str, Sequence[Response]]) -> dict[str, Any]:
    """Return the share of responses whose cost is above 0, by group; nothing where there is no cost."""
    costs = {tag: [row.cost for row in group if row.cost is not None] for tag, group in groups.items()}
    return {"unsafe": {tag: rate([cost > 0 for cost in found]) for tag, found in costs.items()}} if costs["all"] else {}


def rate(flags: Sequence[bool]) -> dict[str, Any]:
    """Return a share with its Wilson interval."""
    return agreement.wilson(sum(flags), len(flags))._asdict()


def differences(responses: dict[str, list[Response]]) -> list[dict[str, Any]]:
    """Return paired differences between policies: of refusal rates by tag, and of mean scores over all prompts."""
    result = []
    for against, policy in itertools.combinations(responses, 2):
        pairs = list(zip(responses[policy], responses[against], strict=True))
        measured: dict[tuple[str, str], list[tuple[float, float]]] = {
            ("refusal", tag): [(a.refused, b.refused) for a, b in pairs if a.prompt.tag == tag]
            for tag in sorted({row.prompt.tag for row in responses[policy]})
        }
        measured |= {(key, "all"): [(getattr(a, key), getattr(b, key)) for a, b in pairs] for key in (SCORE, *BESIDE)}
        for (metric, tag), values in measured.items():
            if None not in values[0]:
                head = {"policy": policy, "against": against, "metric": metric, "tag": tag, "n": len(values)}
                result.append(head | agreement.paired_bootstrap(*zip(*values, strict=True))._asdict())
    return result


def win_rates(run: Run, base: SharedBase, responses: dict[str, list[Response]]) -> list[dict[str, Any]]:
    """Let the judges compare policies on some prompts of each tag, as `label` does; equal answers are ties."""
    settings = run.recipe.evaluate
    panel = panel_of(run, Engines(run, base, batch_size=settings.batch_size), NAME)
    result = []
    for against, policy in itertools.combinations(responses, 2):
        seen: Counter[str] = Counter()
        pairs: list[Candidate] = []
        equal = 0
        for ours, theirs in zip(responses[policy], responses[against], strict=True):
            seen[ours.prompt.tag] += 1
            if seen[ours.prompt.tag] > settings.judge_prompts_per_tag:
                continue
            if ours.text == theirs.text:
                equal += 1
                continue
            name = f"{ours.prompt.id}/{policy}-{against}"
            pairs.append(of_prompt(run, ours.prompt, ours.text, theirs.text, name))
        ballots = cast(panel, pairs, f"judge: {policy} against {against}")
        strengths = [ballot.strength for ballot in ballots if ballot.strength is not None]
        wins, losses = (sum(sign * strength > 0 for strength in strengths) for sign in (1, -1))
        n, failed = len(strengths) + equal, len(ballots) - len(strengths)
        verdicts = [verdict for ballot in ballots for verdict in ballot.verdicts]
        head = {"policy": policy, "against": against, "failed": failed}
        result.append(
            {**head, "wins": wins, "losses": losses, "ties": n - wins - losses}
            | (agreement.win_rate(wins, n - wins - losses, n)._asdict() if n else _NO_PAIRS)
            | {"same_position": rate([verdict.same_position for verdict in verdicts]) if verdicts else None}
        )
    return result


def samples(responses: dict[str, list[Response]]) -> list[dict[str, Any]]:
    """Return a few prompts of each tag with every policy's answer, for the report."""
    result = []
    seen: Counter[str] = Counter()
    for rows in zip(*responses.values(), strict=True):
        prompt = rows[0].prompt
        seen[prompt.tag] += 1
        if seen[prompt.tag] > _SAMPLES_PER_TAG:
            continue
        by_policy = dict(zip(responses, rows, strict=True))
        result.append(
            {
                "prompt_id": prompt.id,
                "prompt": prompt.prompt,
                "tag": prompt.tag,
                "responses": {name: row.text for name, row in by_policy.items()},
                "scores": {name: row.score for name, row in by_policy.items()},
                "refused": {name: row.refused for name, row in by_policy.items()},
            }
        )
    return result
