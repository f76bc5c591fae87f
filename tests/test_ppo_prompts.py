"""The prompts that PPO learns on."""

from types import SimpleNamespace

import pytest

from rlaif.errors import ConfigError
from rlaif.records import Prompt
from rlaif.stages.ppo_prompts import prompts_of

PROMPTS = [Prompt(id=tag, prompt=f"{tag}?", tag=tag) for tag in ("harmful", "ordinary")]


def run_with(gate_tags):
    settings = SimpleNamespace(gate_tags=gate_tags, prompts_per_tag={})
    return SimpleNamespace(
        recipe=SimpleNamespace(ppo=settings), prompts=PROMPTS, select=lambda split, per_tag: [split, per_tag]
    )


def test_a_gate_tag_that_no_prompt_has_is_refused_with_the_nearest_one():
    message = r"^ppo\.gate_tags: no prompt has the tag `harmfull`; did you mean `harmful`\? There are: .*`ordinary`\."
    with pytest.raises(ConfigError, match=message):
        prompts_of(run_with(["harmful", "harmfull"]))


@pytest.mark.parametrize("gate_tags", [[], ["harmful"]])
def test_known_gate_tags_change_nothing_in_what_is_selected(gate_tags):
    assert prompts_of(run_with(gate_tags)) == ["train", {}]
