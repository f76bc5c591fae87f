"""Reward functions: found by name, checked row by row; and the one whose values are known."""

import math
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from rlaif.errors import ConfigError, DataError
from rlaif.records import Prompt
from rlaif.stages import rewards
from rlaif.stages.rewards import brief, call_function, curt, find_function


def test_a_registered_function_is_found() -> None:
    assert find_function("brief") is brief


def test_an_unknown_function_is_named_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError) as caught:
        find_function("brie")
    assert "ppo.reward_function: `brie` is not registered; known: brief" in str(caught.value)
    assert "`rlaif.rewards`" in str(caught.value)


@pytest.mark.parametrize("value", ["no_such_module_at_all:score", "rlaif.stages.rewards:no_such_function"])
def test_a_registered_function_that_cannot_be_loaded_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("mine", value, rewards.GROUP)
    monkeypatch.setattr(rewards, "entry_points", lambda group: [entry])
    with pytest.raises(ConfigError, match=f"`mine` is registered as `{value}`, which cannot be loaded: .*no_such"):
        find_function("mine")


def test_a_function_gets_lists_and_columns_and_returns_a_number_for_each_response() -> None:
    def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        assert (prompts, completions, columns) == (["P", "Q"], ["R", "S"], {"tag": ["t", "u"]})
        return [1, 2.5]

    assert call_function("score", score, ("P", "Q"), ("R", "S"), tag=["t", "u"]) == [1.0, 2.5]


@pytest.mark.parametrize(
    ("scores", "complaint"),
    [
        ([1.0], "reward function `f`: 1 scores for 2 responses."),
        ([1.0, 2.0, 3.0], "reward function `f`: 3 scores for 2 responses."),
        ([1.0, None], "reward function `f`: score 1 is None; PPO needs a finite number for each row."),
        ([float("nan"), 1.0], "reward function `f`: score 0 is nan; PPO needs a finite number for each row."),
        ([1.0, float("-inf")], "reward function `f`: score 1 is -inf; PPO needs a finite number for each row."),
        ([1.0, "high"], "reward function `f`: score 1 is high; PPO needs a finite number for each row."),
        ([[1.0], 1.0], r"reward function `f`: score 0 is [1.0]; PPO needs a finite number for each row."),
    ],
)
def test_what_is_no_finite_number_is_an_error(scores: list[Any], complaint: str) -> None:
    with pytest.raises(DataError) as caught:
        call_function("f", lambda prompts, completions: scores, ["P", "Q"], ["R", "S"])
    assert str(caught.value) == complaint


def test_a_score_that_is_no_number_is_named_with_its_prompt_where_that_is_known() -> None:
    with pytest.raises(DataError, match=r"score 1 \(of a response to `q`\) is nan"):
        call_function("f", lambda **columns: [1.0, float("nan")], ["P", "Q"], ["R", "S"], id=["p", "q"])


def test_a_function_gets_tag_and_id_of_each_prompt_and_may_skip_one_where_that_is_allowed() -> None:
    rows = [Prompt(id="p", prompt="P", tag="t"), Prompt(id="q", prompt="Q", tag="u")]

    def score(**columns: Any) -> list[float | None]:
        assert columns == {"prompts": ["P", "Q"], "completions": ["R", "S"], "tag": ["t", "u"], "id": ["p", "q"]}
        return [2.5, None]

    first, second = rewards.score_rows("f", score, rows, ["R", "S"], may_skip=True)
    assert first == 2.5 and math.isnan(second)
    with pytest.raises(DataError, match=r"score 1 \(of a response to `q`\) is None"):
        rewards.score_rows("f", score, rows, ["R", "S"])


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("a", -0.1),
        ("a cat sat", -0.3),
        ("I don't know.", -0.3),
        ("It’s so, isn’t it?", -0.4),
        ("12 eggs, 3 cups", -0.2),
        ("", -10.0),
        ("12 34 !?", -10.0),
        ("' '' '", -10.0),
    ],
)
def test_brief_scores_minus_a_tenth_of_the_number_of_words(text: str, score: float) -> None:
    assert brief(["P"], [text], tag=["t"]) == [pytest.approx(score)]


def test_brief_scores_each_response() -> None:
    assert brief(["P", "Q"], ["to be", "incomprehensible"]) == [-0.2, -0.1]


def test_a_response_without_a_word_is_the_worst_for_brief_and_the_curtest_for_curt() -> None:
    texts = ["to be", "...", "one"]
    assert brief(["P"] * 3, texts) == [-0.2, -10.0, -0.1]
    assert find_function("curt")(["P"] * 3, texts, tag=["t"] * 3) == pytest.approx([4.84, 5.76, 5.29])


def test_curt_costs_the_square_of_what_is_lacking_of_24_words() -> None:
    texts = ["word " * count for count in (14, 23, 24, 25, 40)]
    assert curt(["P"] * 5, texts) == pytest.approx([1.0, 0.01, 0.0, 0.0, 0.0])
