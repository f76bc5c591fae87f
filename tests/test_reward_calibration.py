"""What a reward model is said to be worth: accuracies by slices, baselines, suspects, biases, the signs of costs."""

import math

import pytest
import torch
from tiny_rows import comparison, ranking, rating

from rlaif.bag_of_words import features, fit
from rlaif.counterfactuals import swap_names, swap_pronouns
from rlaif.model.roles import SharedBase
from rlaif.progress import Progress
from rlaif.recipe import Combination, ModelSection
from rlaif.records import Demonstration, assistant
from rlaif.stages import reward_calibration as worth
from rlaif.stages.reward_model import RewardModel, Scale


def model_of(base, role="reward", **head):
    base.add_role(role, head=True, **head)
    return RewardModel(base, [role], [Scale(0.0, 1.0)] * len(base.head_weight(role)), Combination())


@pytest.fixture
def base(tiny_model):
    return SharedBase.load(ModelSection(model_name_or_path=str(tiny_model)))


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_ties_count_for_the_likelihood_and_not_for_accuracy():
    rows = [comparison(n, preference=p) for n, p in enumerate([1.0, 0.8, 0.5, 1.0])]
    found = worth.describe_pairs(rows, torch.tensor([1.0, -1.0, 3.0, 0.0]), rows)
    right = found["heldout"]["all"]
    assert (right["n"], right["count"], right["rate"]) == (3, 1.5, 0.5)  # a gap of 0 is half right
    assert found["heldout_pairs"] == 4
    expected = [math.log1p(math.exp(-1)), 0.8 * math.log1p(math.e) + 0.2 * math.log1p(math.exp(-1))]
    expected += [0.5 * (math.log1p(math.exp(-3)) + math.log1p(math.exp(3))), math.log(2)]
    assert found["nll"] == pytest.approx(sum(expected) / 4)


def test_accuracy_is_told_by_tag_source_annotator_and_principle():
    votes = [{"principle": "kind"}, {"principle": "honest"}]
    rows = [
        comparison(1, tag="a", source="ai", annotator="judge", votes=votes),
        comparison(2, tag="a", source="human", annotator="ann"),
        comparison(3, tag="", source="human", annotator="bob", votes=votes[:1]),
    ]
    found = worth.describe_pairs(rows, torch.tensor([1.0, -1.0, 1.0]), rows)
    rates = {
        kind: {name: (one["count"], one["n"]) for name, one in found[kind].items()}
        for kind in ("heldout", "by_source", "by_annotator", "by_principle")
    }
    assert rates == {
        "heldout": {"all": (2, 3), "a": (1, 2)},
        "by_source": {"ai": (1, 1), "human": (1, 2)},
        "by_annotator": {"ann": (0, 1), "bob": (1, 1), "judge": (1, 1)},
        "by_principle": {"honest": (1, 1), "kind": (2, 2)},
    }


def test_accuracy_is_told_by_difference_of_lengths_by_preference_and_by_margin():
    rows = [
        comparison(n, "x" * (n + 1), "y" * 4, preference=0.6 + n / 20, margin=float(n) if n % 2 else None)
        for n in range(8)
    ]
    found = worth.describe_pairs(rows, torch.tensor([-1.0] * 4 + [1.0] * 4), rows)
    by_length = found["by_length_difference"]
    assert [(one["low"], one["high"], one["accuracy"]["rate"]) for one in by_length] == [
        (-3, -2, 0.0),
        (-1, 0, 0.0),
        (1, 2, 1.0),
        (3, 4, 1.0),
    ]
    assert [one["accuracy"]["rate"] for one in found["by_preference"]] == [0.0, 0.0, 1.0, 1.0]
    assert [(one["low"], one["accuracy"]["rate"]) for one in found["by_margin"]] == [(1, 0), (3, 0), (5, 1), (7, 1)]


def test_the_baselines_are_rules_on_the_same_pairs_and_a_tie_is_half_right():
    pairs = [
        ("I can't help with that.", "Sure, here is how."),
        ("I'm sorry, but I can't help with that.", "Sure."),
        ("Sure.", "I can't help with that."),
        ("ab", "cd"),
    ]
    rows = [comparison(n, *pair) for n, pair in enumerate(pairs)]
    found = worth.baselines(rows, [comparison(n, "yes indeed", "no indeed") for n in range(9)])
    names = ("longer", "shorter", "refusal_words", "bag_of_words")
    assert [found[name]["count"] for name in names] == [2.5, 1.5, 2.5, 2.0]
    assert {found[name]["n"] for name in names} == {4}


# --- words -----------------------------------------------------------------------------------------------------------


def test_the_bag_of_words_learns_which_words_are_better_and_ranks_unseen_texts():
    fitted = fit(["a kind reply"] * 9 + ["so kind"], ["a rude reply"] * 9 + ["so rude"], [1.0] * 10)
    kind, rude, neither = fitted.scores(["kind words", "rude words", "words"])
    assert kind > neither == 0.0 > rude
    assert kind == pytest.approx(-rude)


def test_the_bag_of_words_follows_soft_labels_and_knows_nothing_of_none():
    """The optimum of the ridge-penalized likelihood: gradients vanish."""
    fitted = fit(["one"] * 40, ["two"] * 40, [0.7] * 40)
    weight = fitted.scores(["one"])[0]
    slope = 40 * (1 / (1 + math.exp(-2 * weight)) - 0.7)
    assert slope + 50.0 * weight == pytest.approx(0, abs=1e-3)
    assert fit(["a"], ["b"], [1.0]).scores(["a", ""]).tolist() == [0.0, 0.0]  # nothing was seen twice
    pairs = {"it's so", "so ,", ", so", "so good", "good ."}
    assert features("It's so, SO good.") == {"it's", "so", ",", "good", "."} | pairs


# --- suspects --------------------------------------------------------------------------------------------------------


def test_suspects_are_the_labels_that_the_members_speak_against_worst_first():
    rows = [comparison(n, preference=p) for n, p in enumerate([1.0, 1.0, 0.9, 0.5])] + [rating(9)]
    members = [
        torch.tensor([[1.0, 2.0], [0.0, 0.0]]),
        torch.tensor([[0.0, 0.0], [1.0, 3.0]]),
        torch.tensor([[0.0, 0.0], [4.0, 4.0]]),
        torch.tensor([[0.0, 0.0], [9.0, 9.0]]),  # a tie has no side to be wrong about
        torch.tensor([[0.0, 0.0]]),
    ]
    found = worth.suspects(worth.Scored(rows, members), 5)
    assert [(row["id"], row["gap"], row["std"]) for row in found] == [("c-2", -4.0, 0.0), ("c-1", -2.0, 1.0)]
    assert worth.suspects(worth.Scored(rows, members), 1) == found[:1]


# --- scoring, references and biases ----------------------------------------------------------------------------------


def test_rows_are_scored_in_any_order_of_batches_and_come_back_in_theirs(base):
    model = model_of(base)
    with torch.no_grad():
        base.head_weight("reward").normal_(generator=torch.Generator().manual_seed(0))
    rows = [comparison(1, "a", "b"), rating(2, "long " * 9), ranking(3, ["x", "y z", "w " * 5]), comparison(4)]
    together = worth.score_rows(model, rows, 8, Progress(quiet=True), "")
    alone = worth.score_rows(model, rows, 1, Progress(quiet=True), "")
    assert [len(own) for own in together.members] == [2, 1, 3, 2]
    assert torch.cat(together.members).flatten().tolist() == pytest.approx(
        torch.cat(alone.members).flatten().tolist(), abs=1e-5
    )
    pairs, gaps = worth.pairs_of(together, model.combine)
    assert [row.id for row in pairs] == ["c-1", "k-3/0-1", "k-3/0-2", "k-3/1-2", "c-4"]
    assert gaps[2] == together.members[2][0, 0] - together.members[2][2, 0]
    assert gaps[0] == together.members[0][0, 0] - together.members[0][1, 0]


def test_scores_are_centred_on_demonstrations_where_there_are_some():
    row = Demonstration(
        id="d",
        prompt=[{"role": "user", "content": "Hi"}],
        completion=assistant("Hello"),
        messages=assistant("Hello"),
    )
    assert worth.references([]) == ("held-out answers", [])
    source, pairs = worth.references([row] * 200)
    assert (source, len(pairs), pairs[0][1][0]["content"]) == ("demonstrations", 64, "Hello")


def test_the_correlation_of_scores_with_length_is_that_of_the_answers():
    rows = [rating(n, "x" * n) for n in range(1, 6)]
    scored = worth.Scored(rows, [torch.tensor([[float(n**3)]]) for n in range(1, 6)])
    found = worth.length_correlation(scored, lambda members: members[:, 0])
    assert found["spearman"] == pytest.approx(1.0)
    assert 0.9 < found["pearson"] < 1.0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("He said she saw him.", "She said he saw her."),
        ("Her mother told her that it is hers.", "His mother told him that it is his."),
        ("His house is his.", "Her house is hers."),
        ("HE helped himself.", "SHE helped herself."),
        ("The theme is other.", "The theme is other."),
    ],
)
def test_pronouns_are_exchanged_by_what_they_stand_for(before, after):
    assert swap_pronouns(before) == after
    assert swap_pronouns(after) == before


def test_names_are_exchanged_as_whole_words():
    assert swap_names("Alice met Bob and Bobby.") == "Bob met Alice and Bobby."
    assert swap_names(swap_names("John, Mary")) == "John, Mary"


def test_counterfactual_gaps_are_zero_for_a_model_that_reads_nothing_and_counted_where_a_text_changes(base):
    model = model_of(base)
    rows = [comparison(1, "He is here", "nobody is"), comparison(2, "none", "nothing", prompt="Ask Alice")]
    found = worth.counterfactual_gaps(model, rows, 1.0, 2)
    assert (found["pronouns"]["answers"], found["names"]["answers"]) == (1, 2)
    assert found["pronouns"]["mean_absolute"] == 0.0
    with torch.no_grad():
        base.head_weight("reward").normal_(generator=torch.Generator().manual_seed(0))
    moved = worth.counterfactual_gaps(model, rows, 0.5, 2)
    doubled = worth.counterfactual_gaps(model, rows, 0.25, 2)
    assert moved["names"]["mean_absolute"] > 0
    assert doubled["names"]["mean_absolute"] == pytest.approx(2 * moved["names"]["mean_absolute"])


# --- costs -----------------------------------------------------------------------------------------------------------


def test_costs_are_right_in_sign_and_in_order_where_rows_say_so():
    rows = [
        comparison(1, safer=1.0, chosen_safe=True, rejected_safe=False),
        comparison(2, safer=0.2, chosen_safe=False),
        comparison(3, safer=0.5, rejected_safe=True),
    ]
    costs = [torch.tensor([-1.0, 2.0]), torch.tensor([-1.0, 1.0]), torch.tensor([3.0, 0.0])]
    found = worth.describe_costs(rows, costs)
    assert (found["sign"]["count"], found["sign"]["n"]) == (3, 4)
    assert (found["sign_of_unsafe"]["count"], found["sign_of_unsafe"]["n"]) == (1, 2)
    assert (found["sign_of_safe"]["count"], found["sign_of_safe"]["n"]) == (2, 2)  # 0 does not say unsafe
    assert (found["unsafe"]["count"], found["unsafe"]["n"]) == (2, 4)
    assert (found["order"]["count"], found["order"]["n"]) == (1, 2)
