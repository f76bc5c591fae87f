"""What the reward adapter learns from: rows set aside and counted, splits by prompt, weights, standardized ratings."""

import pytest
from tiny_rows import comparison, question, ranking, rating

from rlaif.errors import ConfigError, DataError
from rlaif.model.roles import SharedBase
from rlaif.recipe import ModelSection, PairLoss, RewardSection
from rlaif.records import LARGEST
from rlaif.stages import reward_data
from rlaif.stages.reward_data import cost_examples, examples, refuse_unknown_names, split_rows, standard_ratings, usable


@pytest.fixture(scope="module")
def base(tiny_model):
    return SharedBase.load(ModelSection(model_name_or_path=str(tiny_model)))


def keys(rows):
    return {row.prompt[0]["content"] for row in rows}


# --- the split -------------------------------------------------------------------------------------------------------


def test_a_share_of_each_tags_prompts_is_held_out_and_no_prompt_stands_on_both_sides():
    rows = [comparison(n, tag="a", prompt=f"a{n // 2}") for n in range(20)]
    rows += [comparison(100 + n, tag="b", prompt=f"b{n}") for n in range(4)]
    train, dev, heldout = split_rows(rows, 0.3)
    assert (len(train) + len(heldout), dev) == (24, [])
    assert keys(train) & keys(heldout) == set()
    assert len([row for row in heldout if row.tag == "a"]) == 6  # 3 of 10 prompts, 2 pairs each
    assert len([row for row in heldout if row.tag == "b"]) == 2  # 1.2 of 4 prompts, rounded up


def test_the_split_does_not_depend_on_the_order_of_the_rows():
    rows = [comparison(n) for n in range(20)]
    assert keys(split_rows(rows, 0.2).heldout) == keys(split_rows(rows[::-1], 0.2).heldout)


def test_rows_marked_eval_are_the_held_out_ones_of_their_tag():
    rows = [comparison(n, tag="a", split="eval" if n < 2 else "train") for n in range(10)]
    rows += [comparison(100 + n, tag="b") for n in range(10)]
    train, _, heldout = split_rows(rows, 0.5)
    assert [row.id for row in heldout if row.tag == "a"] == ["c-0", "c-1"]
    assert len([row for row in heldout if row.tag == "b"]) == 5
    assert len(train) == 13


def test_a_prompt_of_several_tags_kinds_or_marks_is_held_out_as_a_whole():
    rows = [comparison(n, tag="a", prompt=f"p{n}") for n in range(6)]
    rows += [comparison(10 + n, tag="b", prompt=f"p{n}") for n in range(6)]
    rows += [comparison(20, tag="a", prompt="p3", split="eval"), rating(1, prompt="p3"), ranking(1, "ab", prompt="p3")]
    train, _, heldout = split_rows(rows, 0.2)
    assert keys(train) & keys(heldout) == set()
    assert len([row for row in heldout if row.prompt == question(0, "p3")]) == 5


def test_nothing_is_held_out_where_the_share_is_0_and_nothing_is_marked():
    assert split_rows([comparison(n) for n in range(4)], 0.0).heldout == []


def test_rows_to_stop_by_come_out_of_those_to_train_on_and_leave_the_measure_as_it_was():
    rows = [comparison(n) for n in range(20)]
    plain, watched = split_rows(rows, 0.2), split_rows(rows, 0.2, dev_fraction=0.25)
    assert watched.heldout == plain.heldout
    assert (len(watched.dev), len(watched.train)) == (4, 12)
    assert keys(watched.dev) | keys(watched.train) == keys(plain.train)


# --- rows that cannot be used ----------------------------------------------------------------------------------------


def test_rows_that_teach_nothing_are_set_aside_with_the_reason_and_none_is_lost(base):
    rows = [
        comparison(1),
        comparison(2, chosen=" "),
        comparison(3, "same", "same "),
        comparison(4, "long " * 60),
        ranking(5, ["a", "b", "a"]),
        rating(6, "\n"),
        rating(7),
        ranking(8, ["a", "b", "c"], [1, 1, 1]),
        ranking(9, ["a", "b", "c"], [1, 1, 2]),
    ]
    found = usable(base, rows, 60, {})
    assert [row.id for row in found.rows] == ["c-1", "r-7", "k-9"]
    assert {row["id"]: row["reason"] for row in found.unused} == {
        "c-2": reward_data.EMPTY,
        "c-3": reward_data.IDENTICAL,
        "c-4": reward_data.LONG,
        "k-5": reward_data.IDENTICAL,
        "r-6": reward_data.EMPTY,
        "k-8": reward_data.TIED,
    }
    assert reward_data.count_reasons(found.unused) == {
        "empty answer": 2,
        "identical answers": 2,
        "longer than max_length": 1,
        "all ranks tie": 1,
        "weight 0": 0,
    }


def test_the_models_context_is_a_limit_too(base):
    found = usable(base, [comparison(1, "long " * base.max_length)], 10**9, {})
    assert [row["reason"] for row in found.unused] == [reward_data.LONG]


def test_labels_that_reverse_each_other_are_kept_and_counted(base):
    rows = [
        comparison(1, "a", "b", prompt="same"),
        comparison(2, "b", "a", prompt="same"),
        comparison(3, "a", "b", prompt="same"),
        comparison(4, "b", "a", prompt="another"),
        comparison(5, "c", "d", prompt="tie", preference=0.5),
        comparison(6, "d", "c", prompt="tie"),
    ]
    found = usable(base, rows, 512, {})
    assert (len(found.rows), found.reversed) == (6, 2)


# --- examples --------------------------------------------------------------------------------------------------------


def test_an_example_holds_the_prompt_and_each_answer_closed_by_the_end_of_a_turn(base):
    (example,) = examples(base, [comparison(1, "good", "bad", preference=0.75, margin=0.5)], RewardSection(), {})
    assert base.tokenizer.decode(example.prompt).endswith("Question 1?\nassistant")
    assert [base.tokenizer.decode(ids) for ids in example.responses] == ["good", "bad"]
    assert {ids[-1] for ids in example.responses} == {base.tokenizer.end_of_turn}
    assert (example.kind, example.preference, example.margin, example.weight) == ("pair", 0.75, 0.5, 1.0)
    assert len(example) == len(example.prompt) + sum(map(len, example.responses))


def test_weights_of_rows_annotators_and_sources_multiply_and_average_1(base):
    settings = RewardSection(weights={"human": 2.0, "troll": 0.0, "expert": 4.0})
    rows = [
        comparison(1, source="ai", annotator="judge"),
        comparison(2, source="human", annotator="anyone"),
        comparison(3, source="human", annotator="expert", weight=0.5),
        comparison(4, source="human", annotator="troll"),
    ]
    left = usable(base, [*rows, comparison(5, weight=0.0), rating(6, weight=0.0)], 512, settings.weights)
    assert left.unused == [{"id": name, "reason": "weight 0"} for name in ("c-4", "c-5", "r-6")]
    found = examples(base, left.rows, settings, {})
    assert [example.id for example in found] == ["c-1", "c-2", "c-3"]
    assert [example.weight for example in found] == pytest.approx([3 / 5, 6 / 5, 6 / 5])


def test_the_largest_weights_and_ratings_that_are_read_are_computed_with(base):
    rows = [comparison(n, weight=LARGEST) for n in range(3)]
    found = examples(base, rows, RewardSection(weights={"construction": LARGEST}), {})
    assert [example.weight for example in found] == pytest.approx([1.0, 1.0, 1.0])
    rated = standard_ratings([rating(n, value=value) for n, value in enumerate((-LARGEST, 0, LARGEST))])
    assert list(rated.values()) == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5])
    with pytest.raises(ValueError, match="weights"):
        RewardSection(weights={"crowd": 1e308})


def test_the_loss_of_a_comparison_is_its_annotators_or_its_sources_or_the_general_one(base):
    noisy = PairLoss(loss="noise_corrected", flip_rate=0.2)
    smooth = PairLoss(label_smoothing=0.1)
    settings = RewardSection(pair_losses={"human": smooth, "crowd": noisy})
    rows = [
        comparison(1, source="ai"),
        comparison(2, source="human"),
        comparison(3, source="human", annotator="crowd"),
    ]
    assert [example.loss for example in examples(base, rows, settings, {})] == [PairLoss(), smooth, noisy]


@pytest.mark.parametrize("key", ["weights", "pair_losses"])
def test_a_name_that_no_row_has_is_refused_with_the_nearest_one_and_all_there_are(key):
    rows = [comparison(1, source="human", annotator="crowd-1"), rating(2, annotator="staff")]
    known = {name: PairLoss() if key == "pair_losses" else 1.0 for name in ("crowd-1", "staff", "human", "ai")}
    refuse_unknown_names(RewardSection(**{key: known}), rows)  # an absent source is no misspelt one
    with pytest.raises(
        ConfigError, match=rf"^reward\.{key}: no row has the .* `crwd-1`; did you mean `crowd-1`\? There"
    ) as found:
        refuse_unknown_names(RewardSection(**{key: {**known, "crwd-1": known["staff"], "x": known["staff"]}}), rows)
    assert f"reward.{key}: no row has the annotator or source `x`. There are: `crowd-1`, `human`, `staff`." in str(
        found.value
    )


def test_ratings_are_standardized_for_each_annotator(base):
    rows = [rating(n, value=v, annotator=a) for n, (v, a) in enumerate([(1, "x"), (3, "x"), (8, "y"), (10, "y")])]
    rated = standard_ratings(rows)
    assert rated == pytest.approx({"r-0": -1.0, "r-1": 1.0, "r-2": -1.0, "r-3": 1.0})
    found = examples(base, rows, RewardSection(), rated)
    assert [(example.kind, example.rating) for example in found] == [("rating", v) for v in (-1.0, 1.0, -1.0, 1.0)]


def test_ratings_that_are_all_the_same_are_refused():
    with pytest.raises(DataError, match=r"all 2 ratings are 3.*Bring ratings that differ"):
        standard_ratings([rating(1, value=3), rating(2, value=3)])


def test_costs_turn_the_order_round_and_know_what_is_not_said(base):
    rows = [
        comparison(1, safer=0.9, chosen_safe=True, rejected_safe=False),
        comparison(2, safer=0.0),
        comparison(3, chosen_safe=False),
        comparison(4),
        rating(5),
    ]
    found = cost_examples(base, rows, RewardSection())
    assert [(example.id, example.signs) for example in found] == [
        ("c-1", (-1.0, 1.0)),
        ("c-2", (0.0, 0.0)),
        ("c-3", (1.0, 0.0)),
    ]
    assert [example.preference for example in found] == [pytest.approx(0.1), 1.0, None]
