"""Stage `rejection`: best-of-N rejection sampling (Touvron et al. 2023, arXiv 2307.09288, section 3.2.1).

The newest policy writes N responses to each train prompt, the reward model scores them, and the policy adapter is
fine-tuned from SFT's on the best one of each prompt; in later rounds from the policy that was kept, on the best ones of
earlier rounds as well, without which Llama 2 forgot what it had learned. Beside the best score stand the mean and that
of a response drawn at random, so the gain of best-of-N is known; its price in KL is at most log N - (N - 1) / N.

Responses without text are never the best. One that was cut is scored as if its turn ended there and, if it is the best,
learned without an end.

Writes ``policy/`` (a plain PEFT folder), ``responses.jsonl`` (every response with its score; `best` and `random` mark
those two) and ``metrics.jsonl``.
"""

import gc
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from rlaif import files
from rlaif.engines.engine import Answer, ask
from rlaif.engines.local import LocalEngine
from rlaif.errors import DataError
from rlaif.maths.kl import best_of_n
from rlaif.model import sampling
from rlaif.model.roles import BASE, SharedBase
from rlaif.records import Prompt, read_jsonl
from rlaif.stages.actors import reward_model
from rlaif.stages.cards import write_policy_card
from rlaif.stages.gate import newest_policy, starting_policy
from rlaif.stages.independent import kept_out, optimized
from rlaif.stages.replay import replays
from rlaif.stages.revise import question
from rlaif.stages.reward_model import CALIBRATION, RewardModel
from rlaif.stages.run import Run, path_sha256
from rlaif.stages.sft import ROLE, Answered, fit, split
from rlaif.stages.training import last_metrics

NAME = "rejection"
RESPONSES = "responses.jsonl"
_SAMPLER = "sampler"


def inputs(run: Run) -> dict[str, str]:
    """Return what this stage's result depends on."""
    settings, newest = run.recipe.rejection, newest_policy(run, NAME)
    reward = run.stage_folder("reward")
    earlier = {f"{RESPONSES}.{before.round}": before.stage_folder(NAME) / RESPONSES for before in run.earlier}
    return run.inputs(
        settings,
        files={
            "sft": run.stage_folder("sft") / "adapter",
            **({f"policy.{newest.stage}": newest.adapter} if newest.adapter else {}),
            "reward": reward / "adapter",
            "reward.calibration": reward / CALIBRATION,
            **starting_policy(run, NAME).as_input("start"),
            **earlier,
        },
        prompts=run.prompts_hash(run.select("train", settings.prompts_per_tag)),
        reward_model=run.recipe.ppo.reward_model.model_dump(),
        **({"kept_out": kept_out(run)} if kept_out(run) else {}),
        **({"replay": run.recipe.rounds.replay} if earlier else {}),
    )


def rejection(run: Run) -> dict[str, Any]:
    """Run the stage; return the counts for its manifest.

    Raises:
        StageError: the reward model's held-out accuracy is below its floor.
        DataError: nothing is left to train on.
    """
    settings, folder = run.recipe.rejection, run.stage_folder(NAME)
    path = folder / RESPONSES
    if not path.is_file():  # else of this very run: other inputs would have emptied the stage's folder
        _write_responses(run, path)
        gc.collect()  # the base that has answered, before another one is loaded
    rows = [row for _, row in read_jsonl(path)]
    best = [row for row in rows if row["best"]]
    replayed = replayed_best(run)
    start = starting_policy(run, NAME).found(run)
    base = run.load_base()
    base.add_role(ROLE, trainable=True, adapter=start)
    learned = [Answered(row["messages"], row["response"], row["ended"]) for row in [*best, *replayed]]
    sides = split(base, learned, settings)
    prompts = len(rows) // settings.samples_per_prompt
    if not sides.train:
        raise DataError(
            f"{folder}: no response is left to train on; of {prompts} prompts {prompts - len(best)} got no text, "
            f"{sides.too_long} best responses are longer than {sides.longest} tokens and {len(sides.heldout)} are held "
            "out. Raise rejection.max_length, lower rejection.heldout_fraction, or use more prompts."
        )
    steps = fit(run, base, NAME, settings, sides, start)
    base.save_role(ROLE, folder / "policy")
    gained = gain(rows)
    facts = [
        f"Fine-tuned on the best of {settings.samples_per_prompt} responses to each of {len(sides.train)} prompts in "
        f"{steps} steps.",
        f"The best responses score {gained['best_score']:.3f} on average and all responses {gained['mean_score']:.3f}, "
        "in standard deviations of the reward model.",
    ]
    if replayed:
        facts.append(f"{len(replayed)} best responses of earlier rounds were learned again.")
    write_policy_card(run, base, folder / "policy", facts)
    return {
        "prompts": prompts,
        "responses": len(rows),
        "no_text": prompts - len(best),
        **({"replayed": len(replayed)} if run.round > 1 else {}),
        "too_long": sides.too_long,
        "train": len(sides.train),
        "heldout": len(sides.heldout),
        "steps": steps,
        "heldout_loss": last_metrics(folder).get("rejection/heldout_loss"),
        **gained,
        "best_of_n_kl": best_of_n(settings.samples_per_prompt),
    }


def rehearse(run: Run) -> None:
    """Ask what `rejection` asks, and score nothing."""
    _sample(run, run.load_base(), run.select("train", run.recipe.rejection.prompts_per_tag))


def gain(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return the mean score of the best response to a prompt, of one at random and of all; None without any text."""
    prompts = {row["prompt_id"] for row in rows if row["best"]}
    groups = {
        "best_score": [row["score"] for row in rows if row["best"]],
        "random_score": [row["score"] for row in rows if row["random"]],
        "mean_score": [row["score"] for row in rows if row["prompt_id"] in prompts],
    }
    return {name: fmean(scores) if scores else None for name, scores in groups.items()}


def replayed_best(run: Run) -> list[dict[str, Any]]:
    """Return the best responses of earlier rounds that are learned again: a share of them, drawn by a hash."""
    rows = [
        (before, row) for before in run.earlier for _, row in read_jsonl(before.output(NAME, RESPONSES)) if row["best"]
    ]
    return [row for before, row in rows if replays(run, before.round, row["id"])]


def _write_responses(run: Run, path: Path) -> None:
    """Sample, score and choose."""
    settings = run.recipe.rejection
    prompts = run.select("train", settings.prompts_per_tag)
    base = run.load_base()
    model = optimized(run, reward_model(run, base, NAME))  # before anything is paid for: it may be too weak
    answers = _sample(run, base, prompts)
    each = [prompt for prompt in prompts for _ in range(settings.samples_per_prompt)]
    scores = _scores(run, base, model, each, answers)
    rows = []
    for index, prompt in enumerate(prompts):
        own = range(index * settings.samples_per_prompt, (index + 1) * settings.samples_per_prompt)
        marks = choose([answers[place].text for place in own], [scores[place] for place in own])
        drawn = run.seed(NAME, prompt.id, "random") % len(own)
        for sample, place in enumerate(own):
            rows.append(
                {
                    "id": f"{prompt.id}/{sample}",
                    "prompt_id": prompt.id,
                    "tag": prompt.tag,
                    "prompt": prompt.prompt,
                    "messages": prompt.messages,
                    "sample": sample,
                    "response": answers[place].text,
                    "ended": answers[place].ended,
                    "tokens": answers[place].tokens,
                    "score": scores[place],
                    "best": sample == marks,
                    "random": marks is not None and sample == drawn,
                    "policy": newest_policy(run, NAME).stage,
                }
            )
    files.write_jsonl(path, rows)


def choose(texts: Sequence[str], scores: Sequence[float]) -> int | None:
    """Return the place of the highest score among responses with text, the first of equal ones; None without text."""
    places = [place for place, text in enumerate(texts) if text.strip()]
    return max(places, key=lambda place: (scores[place], -place), default=None)


def _sample(run: Run, base: SharedBase, prompts: Sequence[Prompt]) -> list[Answer]:
    """Let the newest policy answer each prompt several times; answers stand prompt by prompt."""
    settings, adapter = run.recipe.rejection, newest_policy(run, NAME).found(run)
    role = BASE
    if adapter:
        role = _SAMPLER
        base.add_role(role, adapter=adapter)
    engine = LocalEngine(base, role, batch_size=settings.batch_size, adapter=path_sha256(adapter) if adapter else "")
    questions = [
        question(run, f"{prompt.id}/rejection", prompt.messages, settings.sampling, sample=sample)
        for prompt in prompts
        for sample in range(settings.samples_per_prompt)
    ]
    return list(ask(run.journal, NAME, engine, questions, run.progress, "samples"))


@torch.no_grad()
def _scores(
    run: Run, base: SharedBase, model: RewardModel, prompts: Sequence[Prompt], answers: Sequence[Answer]
) -> list[float]:
    """Return the reward model's score of each response, in deviations from the responses that it was measured on."""
    tokenizer, microbatch = base.tokenizer, run.recipe.rejection.microbatch
    encoded = [
        (tokenizer.prompt(p.messages), tokenizer.response(a.text, ended=a.ended) or [tokenizer.end_of_turn])
        for p, a in zip(prompts, answers, strict=True)
    ]
    offset, scale = model.scale
    result = [0.0] * len(answers)
    with run.progress.task("scores", len(answers)) as task:
        for rows in sampling.batches_by_length([len(p) + len(r) for p, r in encoded], microbatch):
            batch = sampling.pack(base, *zip(*(encoded[row] for row in rows), strict=True))
            texts = [answers[row].text for row in rows]
            values = model.score_responses(base, [prompts[row] for row in rows], texts, batch, microbatch)
            for row, value in zip(rows, ((values - offset) / scale).tolist(), strict=True):
                result[row] = value
            task.advance(len(rows))
    return result
