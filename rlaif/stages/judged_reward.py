"""The judge's rating as PPO's reward, without a reward model (d-RLAIF in Lee et al. 2023, arXiv 2309.00267).

A recipe asks for it with `ppo.reward_function: judge`, or with a part of `ppo.rewards`. The judge, the base model or a
server, rates each response from 1 to 10 under the principles that `label.principles` chooses; the rating is moved to
-1 to 1. Ratings go through the journal, so a resumed run does not ask again. Every other name is a registered function.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlaif.constitution import Principle
from rlaif.errors import StageError
from rlaif.maths import agreement
from rlaif.model.roles import BASE, SharedBase
from rlaif.progress import Progress
from rlaif.records import Prompt
from rlaif.stages.candidates import principles_of
from rlaif.stages.rating import Rating, gathered, rate
from rlaif.stages.rewards import RewardFunction, find_function
from rlaif.stages.run import Run, templates
from rlaif.stages.verdicts import Judge, JudgeSettings

JUDGE = "judge"


def reward_function(run: Run, base: SharedBase, stage: str) -> RewardFunction:
    """Return what scores responses in place of a reward model: the judge, or a registered function."""
    name = run.recipe.ppo.reward_function
    assert name, "the recipe names no reward function"
    return judge_function(run, base, stage) if name == JUDGE else find_function(name)


def judge_function(run: Run, base: SharedBase, stage: str) -> RewardFunction:
    """Return the judge as a scoring function; its answers are stored under `stage`."""
    label = run.recipe.label
    engine = run.engine(run.rater, lambda: base, batch_size=label.batch_size, chooses=True)
    settings = JudgeSettings(method="rating", min_option_mass=label.min_option_mass)
    model = run.model_of(run.rater)
    who = Judge(engine, run.constitution, run.journal, Progress(quiet=True), stage, settings, model)
    return as_reward(who, {prompt.id: rated_under(run, prompt) for prompt in run.prompts})


def rated_under(run: Run, prompt: Prompt) -> Sequence[Principle]:
    """Return the principles that a prompt's responses are rated under, each in a request of its own."""
    found = principles_of(run, prompt.id, prompt.tag, prompt.category)
    return [gathered(found)] if run.recipe.label.principles == "together" else found


def reward_inputs(run: Run) -> dict[str, Any]:
    """Return what the judge's rewards depend on; nothing where the judge gives none."""
    settings = run.recipe.ppo
    judged = settings.reward_function == JUDGE or any(part.judge for part in settings.rewards)
    return judge_inputs(run) if judged else {}


def judge_inputs(run: Run) -> dict[str, Any]:
    """Return what the judge's ratings depend on."""
    label = run.recipe.label
    return {
        "judge": [label.principles, label.min_option_mass],
        **({} if run.rater == BASE else {"rater": run.asked(run.rater, chooses=True)}),
        "constitution": run.constitution.hash_of("principles"),
        "templates": [templates("rate")["rate"].hash, templates("gather")["gather"].hash],
    }


def as_reward(who: Judge, principles: Mapping[str, Sequence[Principle]]) -> RewardFunction:
    """Return a scoring function that rates each response: its mean rating over principles, moved to -1 to 1.

    Args:
        who: the judge.
        principles: those that a prompt's responses are rated under, by the prompt's id.

    Returns:
        A function with TRL's signature, which needs the column `id`. It raises a StageError for a response that the
        judge does not rate, since PPO needs a number for every one.
    """

    def score(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        rows = list(zip(columns["id"], prompts, completions, strict=True))
        items = [
            (f"{identifier}/reward/{principle.id}", prompt, response, principle)
            for identifier, prompt, response in rows
            for principle in principles[identifier]
        ]
        rated = iter(rate(who, items, "ratings"))
        return [_mean(who, [next(rated) for _ in principles[row[0]]]) for row in rows]

    return score


def _mean(who: Judge, rated: Sequence[Any]) -> float:
    for one in rated:
        if not isinstance(one, Rating):
            raise StageError(
                f"{who.stage}: the judge `{who.model}` did not rate a response: {one.reason}. A reward needs a number "
                "for every response: use a stronger model, or lower label.min_option_mass."
            )
    return sum(agreement.rescaled_rating(one.expected) for one in rated) / len(rated)
