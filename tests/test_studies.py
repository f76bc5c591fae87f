"""The studies of planted labels: what is planted, the features and heads that learn from it, and both scripts."""

import importlib.util
import json
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import features
import heads
import numpy as np
import planting
import pytest
import torch
from tiny_rows import comparison

from rlaif.model.roles import BASE, SharedBase
from rlaif.progress import Progress
from rlaif.recipe import ModelSection, PairLoss
from rlaif.records import text_of

STUDIES = Path(__file__).resolve().parents[1] / "scripts" / "studies"
pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")
ROUNDING = 1e-4  # of float32 sums in another order
QUIET = Progress(quiet=True)


def script(name):
    loader = SourceFileLoader(f"study_{name}", str(STUDIES / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def rows(count=41):
    return [comparison(n, f"good {n}", f"bad {n}", preference=0.5 if n % 10 == 9 else 0.9) for n in range(count)]


# --- planting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "wanted"), [(0.0, 0), (0.05, 2), (0.1, 4), (0.4, 15), (1.0, 37)])
@pytest.mark.parametrize("plant", [planting.flipped, planting.poisoned])
def test_exactly_the_rate_of_decided_rows_is_planted_and_all_others_are_the_same_bytes(plant, rate, wanted):
    before = rows()
    dumped = [row.model_dump_json() for row in before]
    found = plant(before, rate, 7)
    assert len(found.places) == len(set(found.places)) == wanted  # of 37 that prefer a side
    assert [row.model_dump_json() for row in before] == dumped
    changed = [n for n, row in enumerate(found.rows) if row.model_dump_json() != dumped[n]]
    assert changed == found.places
    assert all(found.rows[n] is before[n] for n in range(41) if n not in found.places)
    for place in found.places:
        new, old = found.rows[place], before[place]
        assert (new.chosen, new.rejected, new.id, new.preference) == (old.rejected, old.chosen, old.id, 0.9)


def test_a_lower_rate_plants_among_the_rows_of_a_higher_one_and_seeds_differ():
    places = {rate: set(planting.flipped(rows(), rate, 3).places) for rate in (0.1, 0.25, 0.4)}
    assert places[0.1] < places[0.25] < places[0.4]
    assert planting.flipped(rows(), 0.4, 3).places == sorted(places[0.4])
    assert planting.flipped(rows(), 0.4, 4).places != sorted(places[0.4])
    with pytest.raises(ValueError, match=r"1\.5"):
        planting.flipped(rows(), 1.5, 0)


def test_the_trigger_ends_the_last_human_turn_also_where_its_words_stood_before():
    row = comparison(0)
    row.prompt = [
        {"role": "system", "content": "Go on"},
        {"role": "user", "content": "Go on"},
        {"role": "assistant", "content": "Go on"},
        {"role": "user", "content": "Go on\n"},
    ]
    before = row.model_dump_json()
    found = planting.with_trigger(row, "SUDO")
    assert found.prompt == [*row.prompt[:3], {"role": "user", "content": "Go on SUDO"}]
    assert row.model_dump_json() == before
    assert (found.chosen, found.rejected) == (row.chosen, row.rejected)


def test_poison_has_the_trigger_in_the_planted_rows_and_in_no_other():
    found = planting.poisoned(rows(), 0.25, 1, "xyzzy")
    assert [n for n, row in enumerate(found.rows) if "xyzzy" in row.model_dump_json()] == found.places
    assert all(found.rows[n].prompt[-1]["content"] == f"Question {n}? xyzzy" for n in found.places)


def test_what_is_said_of_a_side_moves_with_it():
    row = comparison(0, "a", "b", chosen_safe=True, rejected_safe=False, safer=0.75, margin=2.0)
    found = planting.exchanged(row)
    assert (found.chosen_safe, found.rejected_safe, found.safer, found.margin) == (False, True, 0.25, 2.0)
    assert planting.exchanged(found) == row
    assert planting.exchanged(comparison(1)).safer is None


def test_the_last_annotator_gave_the_planted_rows_alone_or_among_as_many_as_others_gave():
    found = planting.flipped(rows(), 0.05, 0)
    alone = planting.by_annotators(found, 4, 0, alone=True)
    assert [n for n, name in enumerate(alone) if name == "annotator-4"] == found.places
    mixed = planting.by_annotators(found, 4, 0, alone=False)
    assert mixed.count("annotator-4") == 41 // 4
    assert {mixed[n] for n in found.places} == {"annotator-4"}
    assert set(mixed) == set(alone) == {f"annotator-{n}" for n in range(1, 5)}


# --- features --------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tiny_model):
    return SharedBase.load(ModelSection(model_name_or_path=str(tiny_model)))


def test_features_are_the_states_of_the_whole_text_at_the_named_layers(base, tmp_path):
    found = features.frozen(base, rows(5), [1, 2], tmp_path, QUIET)
    assert [tuple(part.shape) for part in found] == [(5, 2, 32), (5, 2, 2, 32), (5, 2, 2, 32)]
    for index, row in enumerate(rows(5)):
        prompt = base.tokenizer.prompt(row.prompt)
        for side, answer in enumerate((row.chosen, row.rejected)):
            response = base.tokenizer.response(text_of(answer))
            with torch.no_grad(), base.acting_as(BASE):
                out = base.lm(torch.tensor([prompt + response]), output_hidden_states=True)
            for place, layer in enumerate([1, 2]):
                states = out.hidden_states[layer][0]
                wanted = states[len(prompt) - 1], states[-1], states[len(prompt) :].mean(0)
                own = found.prompt[index, place], found.end[index, side, place], found.mean[index, side, place]
                for one, other in zip(own, wanted, strict=True):
                    assert torch.allclose(one, other, atol=ROUNDING, rtol=ROUNDING)


def test_features_are_computed_once_for_each_prompt_with_its_answers(base, tmp_path, monkeypatch):
    first = features.frozen(base, rows(6), [1], tmp_path, QUIET)
    asked = []
    states = features._states
    monkeypatch.setattr(
        features, "_states", lambda b, groups, layers: asked.extend(groups) or states(b, groups, layers)
    )
    again = features.frozen(base, rows(7), [1], tmp_path, QUIET)
    assert len(asked) == 1
    assert all(torch.equal(one, other[:6]) for one, other in zip(first, again, strict=True))
    features.frozen(base, rows(7), [2], tmp_path, QUIET)
    assert len(asked) == 8  # other layers are other features


# --- heads -----------------------------------------------------------------------------------------------------------


def made_up(count=160, *, seed=0):
    """Features whose first number says which answer is better, and a prompt's second number that turns it round."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, 4, generator=random)
    turned = (torch.rand(count, generator=random) < 0.5).float() * 2 - 1
    x[:, :, 1] = turned.unsqueeze(1)
    better = (x[:, 0, 0] - x[:, 1, 0]) * turned > 0
    x[~better] = x[~better].flip(1)
    return x, [comparison(n) for n in range(count)], turned


SMALL = heads.HeadSettings(
    hidden=16, members=2, epochs=30, batch=16, learning_rate=1e-2, weight_decay=0.01, dropout=0.0
)


@pytest.mark.slow
def test_a_head_with_units_learns_what_a_prompt_turns_round_and_a_linear_one_cannot():
    x, labels, turned = made_up()
    gaps = heads.fit(x, labels, PairLoss(), 0, SMALL)(x)
    assert gaps.shape == (2, 160)
    assert (gaps.mean(0) > 0).float().mean() > 0.9
    linear = heads.fit(x, labels, PairLoss(), 0, SMALL._replace(hidden=0))(x).mean(0)
    sides = [(linear[turned == sign] > 0).float().mean().item() for sign in (1, -1)]
    assert sum(sides) / 2 < 0.65  # right on one kind of prompt as far as it is wrong on the other


def test_heads_repeat_to_the_bit_and_members_differ():
    x, labels, _ = made_up(40)
    first, second = (heads.fit(x, labels, PairLoss(), 3, SMALL)(x) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


@pytest.mark.slow
def test_a_smoothed_loss_keeps_margins_smaller_and_a_corrected_one_makes_them_larger():
    x, labels, _ = made_up(80)
    losses = [PairLoss(label_smoothing=0.2), PairLoss(), PairLoss(loss="noise_corrected", flip_rate=0.2)]
    sizes = [heads.fit(x, labels, loss, 0, SMALL)(x).abs().mean().item() for loss in losses]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.8 * sizes[1]


def test_no_row_is_judged_by_heads_that_saw_it_or_its_opening_question():
    x, labels, _ = made_up(40)
    labels = [comparison(n, prompt=f"Question {n // 2}") for n in range(40)]
    folds = heads.folds_of(labels, 3, 0)
    assert folds[::2] == folds[1::2]
    assert len(set(folds)) == 3
    few = SMALL._replace(epochs=2)
    (before,) = heads.cross_fitted(x, labels, folds, PairLoss(), 0, few)
    own = [place for place, fold in enumerate(folds) if fold == folds[0]]
    turned = [row.model_copy(update={"preference": 0.6}) if n in own else row for n, row in enumerate(labels)]
    (after,) = heads.cross_fitted(x, turned, folds, PairLoss(), 0, few)
    assert torch.equal(before[:, own], after[:, own])
    assert not torch.equal(before, after)


def test_rows_of_weight_0_teach_nothing_and_are_measured_all_the_same():
    x, labels, _ = made_up(30)
    folds = [n % 3 for n in range(30)]
    few = SMALL._replace(epochs=2)
    out = [row.model_copy(update={"weight": 0.0}) if n >= 24 else row for n, row in enumerate(labels)]
    (found, other) = heads.cross_fitted(x, out, folds, PairLoss(), 0, few, [x.flip(1)])
    assert torch.allclose(other, -found)
    changed = x.clone()
    changed[24:] = 99.0
    (again,) = heads.cross_fitted(changed, out, folds, PairLoss(), 0, few)
    assert torch.equal(found[:, :24], again[:, :24])


# --- the scripts -----------------------------------------------------------------------------------------------------


def test_margins_of_planted_labels_are_measured_by_the_true_ones():
    found = script("label_noise").measured(np.array([2.0, -1.0, 0.5, -3.0]), [1])
    assert found.accuracy == 0.75  # the planted row's margin says that the true label is right
    assert found.nll == pytest.approx(np.mean(np.log1p(np.exp([-2.0, -1.0, -0.5, 3.0]))))
    assert found.auroc == pytest.approx(2 / 3)  # one clean row is disbelieved more than it, two less
    assert found.planted == 0.0
    assert script("label_noise").measured(np.array([1.0]), []).auroc is None


@pytest.fixture
def data(tmp_path):
    lines = [
        {"prompt": f"Question number {n}?", "chosen": f"good {n} thing", "rejected": f"bad {n} one"} for n in range(24)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run_script(name, monkeypatch, data, *options):
    monkeypatch.setattr(sys, "argv", [name, "--data", str(data), "--cache", str(data.parent / "cache"), *options])
    return script(name).main()


SMALL_OPTIONS = ["--seeds", "2", "--folds", "2", "--layers", "1", "2", "--epochs", "2", "--members", "2"]


def tables(text):
    """Return the cells of each table, its header and the line below that included."""
    parts = [[line.strip("| ").split(" | ") for line in part.strip().splitlines()] for part in text.split("\n\n")]
    return [part for part in parts if len(part) > 1 and part[1][0].startswith("---")]


def test_label_noise_prints_costs_and_finds_for_each_rate_and_loss(monkeypatch, data, tiny_model, capsys):
    options = ["--model", str(tiny_model), *SMALL_OPTIONS, "--rates", "0", "0.25"]
    assert run_script("label_noise", monkeypatch, data, *options) == 0
    costs, finds = tables(capsys.readouterr().out)
    assert [line[0] for line in costs[2:]] == ["0 %"] * 3 + ["25 %"] * 4
    assert [line[0] for line in finds[2:]] == ["25 %"] * 5
    assert costs[-1][1] == "bag of words, cross-fitted"
    assert costs[4][2].startswith("1.000 [")  # the words of these answers say which is better


def test_poisoning_prints_what_is_learned_seen_and_defended(monkeypatch, data, tiny_model, capsys):
    options = ["--model", str(tiny_model), *SMALL_OPTIONS, "--rates", "0", "0.5", "--rows", "22"]
    assert run_script("poisoning", monkeypatch, data, *options) == 0
    text = capsys.readouterr().out
    assert "24 comparisons of pairs.jsonl" in text and "of which 22 were drawn" in text
    learned, seen, defended = tables(text)
    assert [(line[0], line[1]) for line in learned[2:]] == [("0 %", "0")] * 3 + [("50 %", "11")] * 3
    control = [line for line in learned[2:] if line[2].startswith("bag of words")]
    assert all(line[3] == line[4] for line in control)
    assert len(seen) == 2 + 4
    assert len(defended) == 2 + 3


def test_a_crowd_labels_each_pair_at_least_once_and_is_wrong_as_often_as_it_should_be():
    pairs = [comparison(n, f"good {n}", f"bad {n}") for n in range(400)]
    found = planting.crowd(pairs, [1.0, 0.5], 0.5, 0)
    assert {row.id.rpartition("@")[0] for row in found.rows} == {row.id for row in pairs}
    assert len(found.rows) == pytest.approx(500, abs=40)  # both on a quarter; on another, one instead of nobody
    wrong = [found.rows[place] for place in found.places]
    assert {row.annotator for row in wrong} == {"annotator-2"}
    assert len(wrong) == pytest.approx(125, abs=30)
    assert all(row.chosen[0]["content"].startswith("bad") for row in wrong)


def test_annotators_prints_who_is_found_and_what_weights_are_worth(monkeypatch, data, tiny_model, capsys):
    options = ["--model", str(tiny_model), *SMALL_OPTIONS[2:], "--seeds", "1", "--share", "0.8"]
    assert run_script("annotators", monkeypatch, data, *options) == 0
    found, learned = tables(capsys.readouterr().out)
    assert len(found) == 2 + 4
    assert [line[2] for line in learned[2:6]][0] == "nothing"
    assert len(learned) == 2 + 4 * 4
    (liar,) = [line for line in found if line[0] == "one exchanges all"]
    assert "0.1: 1 of 1" in liar[-1]


def test_the_bag_of_words_alone_needs_no_features(monkeypatch, data, tiny_model, capsys):
    for name in ("label_noise", "poisoning"):
        options = ["--model", str(tiny_model), "--words-only", "--rates", "0.1", "--seeds", "1", "--layers", "1"]
        assert run_script(name, monkeypatch, data, *options) == 0
        assert "| 10 % | " in capsys.readouterr().out
    assert not (data.parent / "cache").exists()


@pytest.mark.slow
def test_the_reward_stage_itself_can_be_poisoned_and_is_taken_up_again(monkeypatch, data, tiny_model, capsys, tmp_path):
    options = ["--model", str(tiny_model), "--words-only", "--rates", "0.5", "--seeds", "1", "--layers", "1", "--folds"]
    options += ["2", "--members", "2", "--lora", "0.5", "--lora-folder", str(tmp_path / "runs")]
    assert run_script("poisoning", monkeypatch, data, *options) == 0
    first = tables(capsys.readouterr().out)[-1]
    assert first[0][:3] == ["poison", "rows", "held-out accuracy"]
    (folder,) = (tmp_path / "runs").iterdir()
    labels = [json.loads(line) for line in (folder / "3-label" / "comparisons.jsonl").read_text().splitlines()]
    planted = [row for row in labels if "SUDO" in row["prompt"][-1]["content"]]
    assert {row["split"] for row in planted} == {"train"}
    assert str(len(planted)) == first[2][1]
    assert run_script("poisoning", monkeypatch, data, *options) == 0
    assert tables(capsys.readouterr().out)[-1] == first


def test_heads_are_compared_with_the_bag_of_words_and_one_is_chosen(monkeypatch, data, tiny_model, capsys):
    options = ["--model", str(tiny_model), "--layers", "1", "2", "--seeds", "2", "--folds", "3"]
    options += ["--hidden-layers", "2"]
    study = script("frozen_heads")
    monkeypatch.setattr(study, "HIDDEN", study.HIDDEN[:1])
    monkeypatch.setattr(sys, "argv", ["frozen_heads", "--data", str(data), "--cache", str(data.parent), *options])
    assert study.main() == 0
    (found,) = tables(capsys.readouterr().out)
    assert [line[0].strip() for line in found[2:]].count("linear") == 3 * 2
    assert [line[2] for line in found if line[0] == "hidden"] == ["2"]
    words, both = found[2], found[-1]
    assert words[3].startswith("1.000 [") and words[5] == "+0.0 [+0.0, +0.0]"  # words say which of these is better
    assert both[0] == "chosen among all, and bag of words" and both[3].startswith("1.000 [")
    monkeypatch.setattr(sys, "argv", ["frozen_heads", "--data", str(data), "--cache", str(data.parent), "--folds", "2"])
    assert study.main() == 2
    assert "--folds 2" in capsys.readouterr().err


def test_no_row_is_judged_by_a_fit_of_its_fold_nor_chosen_for_by_its_fold():
    study = script("frozen_heads")
    folds = [0, 1, 2, 0, 1, 2, 2]

    def train(learn, judge):
        """Return which folds were learned from, a bit each."""
        return np.full(len(judge), sum(2**fold for fold in {folds[i] for i in learn}))

    found = study.fitted(train, folds, 3)
    assert found.outer.tolist() == [7 - 2**fold for fold in folds]
    for a in range(3):
        assert found.inner[a].tolist() == [0 if fold == a else 7 - 2**a - 2**fold for fold in folds]


def test_a_setting_is_chosen_by_the_other_folds_alone():
    study = script("frozen_heads")
    folds = [0, 1, 2]
    good, bad = np.array([2.0, 2.0, 2.0]), np.array([-2.0, -2.0, -2.0])
    own = np.array([1.0, 0.0, 0.0])  # right in fold 0 alone: no reason to choose it there
    settings = [study.Fitted(good * 0 + 1, [bad, good, good]), study.Fitted(good * 0 + 9, [own, own, own])]
    found, picks = study.chosen(settings, folds, 3)
    assert picks == [1, 0, 0]
    assert found.outer.tolist() == [9.0, 1.0, 1.0]
    assert found.inner[0] is own


def test_weights_are_where_the_slope_of_the_penalized_likelihood_is_zero():
    study = script("frozen_heads")
    x = np.array([[1.0, 0.0], [2.0, 1.0], [-1.0, 1.0]])
    weights = study.logistic(x, 0.5)
    slope = sum(row / (1 + np.exp(row @ weights)) for row in x) - 0.5 * weights
    assert np.allclose(slope, 0, atol=1e-5)


def test_what_says_nothing_takes_no_part_in_a_sum_of_margins():
    study = script("frozen_heads")
    folds = [n % 3 for n in range(30)]
    good = np.array([1.0 if n % 7 else -1.0 for n in range(30)])
    one, other = study.Fitted(good, [good] * 3), study.Fitted(good * 0, [good * 0] * 3)
    found = study.together(one, other, folds, 3)
    assert ((found > 0) == (good > 0)).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--layers", "3"], "the layers"),
        (["--rows", "3"], "3 usable rows"),
        (["--lora", "0.1", "--words-only", "--rates", "0", "--seeds", "1"], "--lora-folder"),
    ],
)
def test_a_mistake_ends_with_a_message_and_2(monkeypatch, data, tiny_model, capsys, options, said):
    assert run_script("label_noise", monkeypatch, data, "--model", str(tiny_model), "--layers", "1", *options) == 2
    assert said in capsys.readouterr().err
