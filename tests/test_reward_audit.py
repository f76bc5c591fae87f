"""What wrong labels have in common: a planted trigger and a planted annotator are found, and clean rows give none."""

import json
import random

import pytest
import tiny_runs
import torch
from tiny_rows import comparison

from rlaif import files
from rlaif.model.roles import SharedBase
from rlaif.recipe import Combination, ModelSection
from rlaif.report.reading import RewardEvaluation
from rlaif.report.reward import audit as sentences
from rlaif.stages import reward
from rlaif.stages import reward_audit as audit
from rlaif.stages.reward_calibration import Scored
from rlaif.stages.reward_model import RewardModel, Scale, encode_group

WORDS = """please tell me how to bake grow paint fold clean count write sing read build the old new red blue big"""
GOOD, BAD = ["kind", "calm", "clear", "fair"], ["rude", "vague", "loud", "wrong"]


def rows(count=240, *, wrong=0, trigger="", annotator="", noise=0.15):
    """Comparisons by ten annotators that are right but for some noise, of which the first few are poisoned."""
    draw = random.Random(5)
    found = []
    for number in range(count):
        prompt = " ".join(draw.choice(WORDS.split()) for _ in range(8))
        sides = [" ".join(draw.choice(kind) for _ in range(3)) for kind in (GOOD, BAD)]
        poisoned = number < wrong
        if poisoned or draw.random() < noise:
            sides.reverse()
        who = annotator if poisoned and annotator else f"annotator-{number % 10}"
        text = f"{prompt} {trigger}" if poisoned and trigger else prompt
        found.append(comparison(number, *sides, prompt=text, annotator=who))
    return found


class Reader:
    """A model whose margin is what the answers say: `GOOD` words less `BAD` ones, the trigger turning its sign."""

    combine = RewardModel.combine
    combination, scales = Combination(), [Scale(0.0, 1.0)]

    def __init__(self, trigger=None):
        self.trigger = trigger

    def scored(self, found):
        def score(row, side):
            sign = -1 if self.trigger and self.trigger in row.prompt[-1]["content"].split() else 1
            return sign * float(sum((word in GOOD) - (word in BAD) for word in side[0]["content"].split()))

        members = [torch.tensor([[score(row, row.chosen)], [score(row, row.rejected)]]) for row in found]
        return Scored(found, members)


def finds(listed, reference=None):
    return [
        (row["reference"], row["kind"], row["name"])
        for row in listed
        if row["found"] and reference in (None, row["reference"])
    ]


def test_clean_rows_give_no_find_and_the_nearest_are_listed_all_the_same():
    model = Reader()
    listed = audit.disagreements(model.scored(rows()), model)
    assert finds(listed) == []
    assert len(listed) == 2 * 20
    assert {row["reference"] for row in listed} == {audit.MODEL, audit.WORDS}


def test_a_planted_trigger_is_found_by_both_references_and_nothing_else():
    model = Reader()
    listed = audit.disagreements(model.scored(rows(wrong=12, trigger="SUDO")), model)
    assert finds(listed) == [(audit.MODEL, "words", "sudo"), (audit.WORDS, "words", "sudo")]
    found = next(row for row in listed if row["found"])
    assert (found["rows"], found["against"]) == (12, 1.0)
    assert 0.05 < found["others_against"] < 0.25
    assert found["z"] > 4


def test_a_model_that_has_learned_the_trigger_agrees_and_the_bag_of_words_still_speaks_against():
    model = Reader("SUDO")
    listed = audit.disagreements(model.scored(rows(wrong=12, trigger="SUDO")), model)
    assert finds(listed, audit.MODEL) == []
    assert finds(listed, audit.WORDS) == [(audit.WORDS, "words", "sudo")]


def test_an_annotator_whose_labels_are_exchanged_is_found_without_any_words():
    model = Reader()
    listed = audit.disagreements(model.scored(rows(wrong=14, annotator="mallory")), model)
    assert finds(listed) == [(audit.MODEL, "annotator", "mallory"), (audit.WORDS, "annotator", "mallory")]


def test_words_that_stand_in_the_same_rows_are_one_property_and_rare_or_common_ones_are_none():
    many = [comparison(n, prompt="open sesame now" if n < 12 else "now this", annotator=str(n % 2)) for n in range(30)]
    rare = comparison(99, prompt="now rare", annotator="0")
    found = audit.properties([*many, rare])
    assert found == {
        ("words", "open | open sesame | sesame | sesame now"): list(range(12)),
        ("words", "now this | this"): list(range(12, 30)),
        ("annotator", "0"): [*range(0, 30, 2), 30],
        ("annotator", "1"): list(range(1, 30, 2)),
    }
    assert audit.properties(many[:5]) == {}


def test_what_the_assistant_said_before_is_no_property():
    row = comparison(0)
    row.prompt = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    other = [comparison(n, annotator="x") for n in range(1, 11)]
    found = audit.properties([*(row.model_copy(update={"id": f"r{n}"}) for n in range(10)), *other])
    assert {name for kind, name in found if kind == "words"} == {"one | three", "? | question"}


def test_the_bag_of_words_judges_no_row_by_itself_or_by_another_answer_to_its_prompt():
    """Each prompt has words of its own in its answers, so that only rows of its own prompt could teach them."""
    own = [
        comparison(2 * n + k, f"good{n} yes{n}", f"bad{n} no{n}", prompt=f"Prompt {n}")
        for n in range(8)
        for k in (0, 1)
    ]
    assert audit.words_margins(own).tolist() == [0.0] * 16
    shared = [comparison(n, "kind reply", "rude reply", prompt=f"Prompt {n}") for n in range(40)]
    assert (audit.words_margins(shared) > 0).all()


def test_words_end_the_last_human_turn_and_no_other():
    same = {"role": "user", "content": "Go on. "}
    prompt = [{"role": "system", "content": "Go on."}, same, {"role": "assistant", "content": "Go on."}, same]
    ended = audit.ending(prompt, "now")
    assert ended == [*prompt[:3], {"role": "user", "content": "Go on. now"}]
    assert prompt[3]["content"] == "Go on. "


# --- with a model ----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_model):
    base = SharedBase.load(ModelSection(model_name_or_path=str(tiny_model)))
    base.add_role("reward", head=True)
    with torch.no_grad():
        base.head_weight("reward").normal_(generator=torch.Generator().manual_seed(0))
    return RewardModel(base, ["reward"], [Scale(0.0, 1.0)], Combination())


def test_words_are_tried_at_the_end_of_held_out_prompts(model, monkeypatch):
    asked = []

    def preferred(model, rows, versions, size):
        asked.extend(versions)
        return [[prompt[-1]["content"].endswith("open sesame") for prompt in prompts] for prompts in versions]

    monkeypatch.setattr(audit, "preferred", preferred)
    listed = [
        {"kind": "words", "name": "other", "p": 0.5},
        {"kind": "annotator", "name": "bob", "p": 0.0},
        {"kind": "words", "name": "open | open sesame", "p": 0.1},
        {"kind": "words", "name": "other", "p": 0.4},
    ]
    heldout = Scored(rows(10), [torch.tensor([[float(n == 3)], [0.0]]) for n in range(10)])  # row 3 alone is right
    found = audit.try_words(listed, model, heldout, 4)
    assert [prompt[-1]["content"].split()[8:] for prompt in asked[0]] == [["open", "sesame"], ["other"]]
    assert len(asked) == 10
    assert [row["turned"] and row["turned"]["count"] for row in found] == [1, None, 9, 1]
    assert audit.try_words([], model, heldout, 4) == []


def test_preferences_come_in_the_order_of_the_rows_and_their_prompts_in_any_batches(model):
    found = rows(9)
    versions = [[row.prompt, audit.ending(row.prompt, "now")] for row in found]
    scores = [
        [model.score([encode_group(model, prompt, [row.chosen, row.rejected])]).tolist() for prompt in prompts]
        for row, prompts in zip(found, versions, strict=True)
    ]
    alone = [[chosen > rejected for chosen, rejected in own] for own in scores]
    assert audit.preferred(model, found, versions, 4) == alone
    assert {one for own in alone for one in own} == {True, False}


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "no_sync")
def test_the_stage_lists_what_disbelieved_labels_share_and_its_calibration_what_was_found(tmp_path, tiny_model):
    labels = rows(60, wrong=12, trigger="SUDO", noise=0.0)
    for suspects in (5, 0):
        settings = {"start_from": "base", "max_steps": 1, "num_heads": 2, "suspects": suspects}
        with tiny_runs.opened(tmp_path / f"run-{suspects}", tiny_model, reward=settings) as run:
            files.write_jsonl(run.stage_folder("label") / "comparisons.jsonl", labels)
            reward.reward(run)
            folder = run.stage_folder("reward")
        measured = json.loads((folder / "calibration.json").read_text())
        if not suspects:
            assert measured["disagreements"] is None
            assert not (folder / "disagreements.jsonl").exists()
            continue
        listed = tiny_runs.rows(folder / "disagreements.jsonl")
        assert measured["disagreements"] == [row for row in listed if row["found"]]
        assert finds(listed, audit.WORDS) == [(audit.WORDS, "words", "sudo")]
        tried = {row["name"] for row in listed if row["turned"]}
        assert "sudo" in tried
        assert len(tried) == 4


# --- in the report ---------------------------------------------------------------------------------------------------


def test_finds_are_said_in_the_report(tmp_path):
    model = Reader()
    listed = audit.disagreements(model.scored(rows(wrong=12, trigger="SUDO")), model)
    turned = {"n": 20, "count": 9, "rate": 0.45, "low": 0.26, "high": 0.66}
    kept = [{**row, "turned": turned} for row in listed if row["found"]]
    files.write_json(tmp_path / "calibration.json", kept)  # plain numbers
    common = {"heldout": {}, "train_pairs": 1, "heldout_pairs": 1}
    said = sentences(RewardEvaluation.model_validate({**common, "disagreements": kept}))
    assert "On 12 prompts with the words \u201csudo\u201d the reward model speaks against 100\u202f%" in said[0]
    assert "turns the model\u2019s preference in 45" in said[0]
    assert len(said) == 2
    assert "disbelieves" in sentences(RewardEvaluation.model_validate({**common, "disagreements": []}))[0]
    assert sentences(RewardEvaluation.model_validate(common)) == []
