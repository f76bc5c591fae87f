"""The prompts of PPO: which an update has, and whether there is room to answer them."""

import random

from rlaif.errors import ConfigError, DataError
from rlaif.model.roles import SharedBase
from rlaif.records import Prompt
from rlaif.stages.checkpoints import STAGE
from rlaif.stages.run import Run
from rlaif.validation import unknown_name


def prompts_of(run: Run) -> list[Prompt]:
    """Return the prompts that PPO learns on.

    Raises:
        ConfigError: `ppo.gate_tags` has a tag that no prompt has, and would change nothing.
        DataError: there are fewer of a tag than asked for.
    """
    settings = run.recipe.ppo
    tags = {prompt.tag for prompt in run.prompts}
    unknown = [tag for tag in settings.gate_tags if tag not in tags]
    if unknown:
        raise ConfigError(*(unknown_name("ppo.gate_tags", tag, "no prompt has the tag", tags) for tag in unknown))
    return run.select("train", settings.prompts_per_tag)


def refuse_long(base: SharedBase, prompts: list[Prompt], max_new_tokens: int) -> None:
    """Stop where a prompt and its response do not fit the model's context.

    Raises:
        DataError: the first such prompt, with its length.
    """
    for prompt in prompts:
        length = len(base.tokenizer.prompt(prompt.messages))
        if length + max_new_tokens > base.max_length:
            raise DataError(
                f"ppo: `{prompt.id}`: {length} prompt tokens and {max_new_tokens} new ones; the model's context holds "
                f"{base.max_length}. Shorten the prompt, or lower ppo.sampling.max_new_tokens."
            )


def prompts_of_update(run: Run, prompts: list[Prompt], update: int) -> list[Prompt]:
    """Return the prompts of one update: epochs over a shuffled order, each repeated `samples_per_prompt` times."""
    settings = run.recipe.ppo
    chosen: list[Prompt] = []
    for position in range(update * settings.rollout_batch, (update + 1) * settings.rollout_batch):
        epoch, index = divmod(position, len(prompts))
        order = list(range(len(prompts)))
        random.Random(run.seed(STAGE, "order", epoch)).shuffle(order)
        chosen += [prompts[order[index]]] * settings.samples_per_prompt
    return chosen
