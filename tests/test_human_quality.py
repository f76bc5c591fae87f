"""How good annotators are: planted ones are found, and what their labels then count."""

import random

import pytest
from tiny_rows import comparison, ranking, rating

from rlaif.human.pairs import Pair, turned
from rlaif.human.quality import AGAINST, ALONE, FEW, WEAKER, judgements, measure, summary, weighed
from rlaif.records import Comparison


def crowd(skills, pairs=200, seed=0, share=1.0):
    """Return what annotators of known skill say of pairs; `good` is the better answer of each."""
    rng = random.Random(seed)
    rows = []
    for number in range(pairs):
        for name, skill in skills.items():
            if rng.random() < share:
                sides = ("good", "bad") if rng.random() < skill else ("bad", "good")
                told = {"annotator": name, "source": "human", "prompt": f"Question {number}?"}
                rows.append(comparison(f"{number}-{name}", *sides, **told))
    return rows


def found(rows, known=()):
    quality = measure(rows, known)
    assert quality is not None
    return quality, {one.annotator: one for one in quality.annotators}


# --- judgements ------------------------------------------------------------------------------------------------------


def test_all_kinds_of_rows_are_judgements_of_the_same_pairs():
    rows = [
        comparison(1, "b", "a", annotator="ann", preference=0.8),
        ranking(1, ["b", "a", "c"], [1, 2, 2]),
        rating(1, "a", 2.0, annotator="ben"),
        rating(1, "b", 4.0, annotator="ben"),
        rating(1, "c", 4.0, annotator="ben"),
    ]
    said = {}
    for one in judgements(rows):
        said.setdefault(one.pair, []).append((one.annotator, one.first))
    kinds = sorted([sorted(name for name, _ in by) for by in said.values()])
    assert kinds == [["ann", "ben", "test"], ["ben", "test"], ["ben", "test"]]
    [all_three] = [dict(by) for by in said.values() if len(by) == 3]
    assert len({value > 0.5 for value in all_three.values()}) == 1  # all prefer b
    assert all_three["ann"] in (pytest.approx(0.8), pytest.approx(0.2))
    ties = sorted(sorted(value for _, value in by) for by in said.values() if len(by) == 2)
    assert [0.5 in values for values in ties] == [True, True]  # the ranking ties a and c, the ratings b and c


def test_many_ratings_of_one_prompt_do_not_make_all_pairs_and_the_same_ones_for_all():
    rows = [
        rating(1, f"answer {n}", float(n if name == "ann" else n + n % 3), annotator=name)
        for name in ("ann", "ben")
        for n in range(400)
    ]
    rows.append(rating(1, " answer 1\n", 9.0, annotator="ann"))  # rated once more
    said = {}
    for one in judgements(rows):
        said.setdefault(one.annotator, set()).add(one.pair)
    assert len(said["ann"] ^ said["ben"]) < 40
    assert 400 < len(said["ann"]) < 400 * 20


def test_the_order_of_answers_and_white_space_around_them_do_not_matter():
    one, other = (next(judgements([row])) for row in (comparison(1, "b", "a"), comparison(1, "a", " b\n")))
    assert one.pair == other.pair
    assert {one.first, other.first} == {0.0, 1.0}
    assert next(judgements([comparison(2, "b", "a")])).pair != one.pair


def test_votes_of_people_are_theirs_and_those_of_models_are_the_panels():
    votes = [
        {"annotator": "ann", "preference": 1.0},
        {"annotator": "ben", "preference": 0.5},
        {"annotator": "cy", "preference": 7},
        {"annotator": "di"},
    ]
    people = comparison(1, annotator="human", source="human", votes=votes)
    assert [one.annotator for one in judgements([people])] == ["ann", "ben"]
    panel = comparison(1, annotator="panel", source="ai", votes=votes)
    assert [one.annotator for one in judgements([panel])] == ["panel"]


# --- who is good -----------------------------------------------------------------------------------------------------


def test_planted_skills_are_found_the_weakest_first_and_weigh_what_they_are_worth():
    skills = {"ann": 0.95, "ben": 0.9, "cy": 0.8, "coin": 0.5, "liar": 0.1}
    quality, by = found(crowd(skills, 400, share=0.8))
    assert [one.annotator for one in quality.annotators] == ["liar", "coin", "cy", "ben", "ann"]
    for name, skill in skills.items():
        assert by[name].skill == pytest.approx(skill, abs=0.06)
        assert by[name].weight == pytest.approx(max(0.0, 2 * by[name].skill - 1))
    assert (by["liar"].weight, by["liar"].finding) == (0.0, AGAINST)
    assert by["coin"].finding == WEAKER
    assert by["ann"].finding == by["ben"].finding == ""
    assert quality.weights == {one.annotator: one.weight for one in quality.annotators}
    assert -0.2 < quality.alpha < 0.2  # the liar takes back what the others agree on


def test_alike_annotators_are_seldom_found_weaker():
    names = [f"a{number}" for number in range(8)]
    findings = [
        one.finding
        for seed in range(10)
        for one in found(crowd(dict.fromkeys(names, 0.8), 60, seed, 0.5))[0].annotators
    ]
    assert findings.count(WEAKER) + findings.count(AGAINST) <= 2  # of 80


def test_one_whose_labels_are_exchanged_in_a_twentieth_of_all_rows_is_named():
    honest = {f"a{number}": 0.9 for number in range(5)}
    for seed in range(5):
        rows = crowd({**honest, "mallory": 0.9}, 200, seed, 0.5)
        own = [row for row in rows if row.annotator == "mallory"]
        for row in own[: len(rows) // 20]:
            row.chosen, row.rejected = row.rejected, row.chosen
        _, by = found(rows)
        assert [name for name, one in by.items() if one.finding] == ["mallory"]


def test_known_answers_tell_who_is_good_where_nobody_shares_a_pair():
    rows = crowd({"ann": 0.9}, 60) + [
        row.model_copy(update={"prompt": [{"role": "user", "content": f"Other {place}?"}]})
        for place, row in enumerate(crowd({"coin": 0.5}, 60))
    ]
    assert measure(rows) is None
    known = [row.model_copy(update={"annotator": "expert"}) for row in rows]
    for row in known:
        if row.chosen[0]["content"] == "bad":
            row.chosen, row.rejected = row.rejected, row.chosen
    quality, by = found(rows, known)
    assert sorted(by) == ["ann", "coin"]
    assert by["ann"].skill == pytest.approx(0.9, abs=0.08)
    assert by["coin"].skill == pytest.approx(0.5, abs=0.12)
    assert by["ann"].agreement.n == by["ann"].shared == 60
    assert quality.shared == 120


def test_known_answers_show_that_the_majority_is_wrong():
    rows = crowd({"ann": 0.95, "bad": 0.2, "worse": 0.15}, 100)
    known = [row.model_copy(update={"annotator": "expert"}) for row in crowd({"ann": 1.0}, 20)]
    _, by = found(rows, known)
    assert by["ann"].skill > 0.8 > 0.4 > by["bad"].skill


def test_who_shares_no_pair_is_taken_for_as_good_as_the_others_of_the_source():
    rows = crowd({"ann": 0.95, "ben": 0.95, "cy": 0.95}, 100)
    judged = [
        row.model_copy(update={"source": "ai", "annotator": "judge", "id": f"j{row.id}"})
        for row in crowd({"judge": 0.6}, 100, seed=3)
    ]
    alone = [
        comparison(f"own-{source}", annotator=f"{source}-alone", source=source, prompt=f"Of {source}?")
        for source in ("human", "ai")
    ]
    _, by = found(rows + judged + alone)
    assert by["human-alone"].finding == by["ai-alone"].finding == ALONE
    assert by["human-alone"].agreement is None
    assert by["human-alone"].skill == pytest.approx(0.95, abs=0.05)
    assert by["ai-alone"].skill == pytest.approx(by["judge"].skill, abs=0.04)


def test_few_shared_pairs_say_little():
    rows = crowd({"ann": 0.9, "ben": 0.9, "cy": 0.9}, 60)
    rows += [row.model_copy(update={"annotator": "new", "id": f"n{row.id}"}) for row in crowd({"ann": 0.0}, 3)]
    _, by = found(rows)
    assert (by["new"].finding, by["new"].q) == (FEW, None)
    assert 0.5 < by["new"].skill < by["ann"].skill


def test_ties_take_no_side_and_contradictions_of_oneself_are_counted():
    rows = crowd({"ann": 1.0, "ben": 1.0}, 20)
    rows += [comparison("tie", "good", "bad", annotator="cy", source="human", prompt="Question 1?", preference=0.5)]
    rows += [comparison("again", "bad", "good", annotator="ben", source="human", prompt="Question 0?")]
    _, by = found(rows)
    assert (by["cy"].labels, by["cy"].shared, by["cy"].finding) == (1, 0, ALONE)
    assert (by["ann"].shared, by["ben"].shared) == (19, 19)  # of the first pair ben says both
    assert (by["ann"].both_ways, by["ben"].both_ways) == (0, 1)


@pytest.mark.parametrize("rows", [[], crowd({"ann": 0.9}, 5), [rating(1), rating(2)]])
def test_without_a_shared_pair_nothing_is_told(rows):
    assert measure(rows) is None


def test_the_table_has_a_line_for_each_annotator_without_control_characters():
    rows = crowd({"ann": 0.95, "b\x1b[2Jen\n": 0.9, "coin": 0.5}, 60)
    rows += [comparison("own", annotator="new", source="ai", prompt="Mine?")]
    lines = summary(found(rows)[0]).splitlines()
    assert lines[0].startswith("61 pairs of answers, 60 of them shared; Krippendorff's alpha 0.")
    assert lines[2].split()[:4] == ["annotator", "source", "pairs", "shared"]
    assert [line.split()[0] for line in lines[3:]] == ["coin", "new", "b[2Jen", "ann"]
    assert lines[4].split()[1:5] == ["ai", "1", "0", "-"] and lines[4].endswith(ALONE)


# --- what labels count -----------------------------------------------------------------------------------------------


def test_a_row_counts_what_its_annotator_does_and_keeps_its_own_weight():
    row = comparison(1, annotator="ann", weight=2.0)
    assert weighed(row, {"ann": 0.25}) == row.model_copy(update={"weight": 0.5})
    assert weighed(rating(1, weight=3.0), {"test": 0.5}).weight == 1.5
    assert weighed(ranking(1, ["a", "b"]), {"test": 0.0}).weight == 0.0


def voted(*preferences, **columns):
    votes = [{"annotator": name, "preference": value} for name, value in zip("abc", preferences, strict=True)]
    preference = sum(preferences) / 3
    return comparison(1, "x", "y", annotator="human", source="human", votes=votes, preference=preference, **columns)


def test_votes_count_what_their_voters_do():
    row = weighed(voted(1.0, 0.0, 1.0), {"a": 0.8, "b": 0.2, "c": 0.2})
    assert row.preference == pytest.approx(1.0 / 1.2)
    assert row.weight == pytest.approx(0.4)
    assert (row.chosen, row.rejected) == (voted(1, 1, 1).chosen, voted(1, 1, 1).rejected)


def test_votes_may_turn_a_preference_and_all_that_belongs_to_it():
    told = {"margin": 2.0, "safer": 0.9, "chosen_safe": True, "rejected_safe": False}
    before = voted(1.0, 0.0, 1.0, **told)
    after = weighed(before, {"a": 0.1, "b": 0.9, "c": 0.1})
    assert (after.chosen, after.rejected) == (before.rejected, before.chosen)
    assert after.preference == pytest.approx(0.9 / 1.1)
    assert (after.margin, after.safer) == (-2.0, pytest.approx(0.1))
    assert (after.chosen_safe, after.rejected_safe) == (False, True)
    assert [vote["preference"] for vote in after.votes] == [0.0, 1.0, 0.0]
    Comparison.model_validate(after.model_dump())
    assert turned(turned(before)) == before


def test_votes_of_nobody_better_than_a_coin_count_nothing():
    row = voted(1.0, 0.0, 1.0)
    after = weighed(row, dict.fromkeys("abc", 0.0))
    assert (after.weight, after.preference) == (0.0, row.preference)


def test_a_pair_of_an_import_is_turned_alike():
    votes = ({"annotator": "a", "preference": 1.0}, {"annotator": "b"})
    pair = Pair(*(comparison(1).model_dump()[key] for key in ("prompt", "chosen", "rejected")), 0.25, votes=votes)
    after = turned(pair)
    assert (after.chosen, after.rejected, after.preference) == (pair.rejected, pair.chosen, 0.75)
    assert after.votes == ({"annotator": "a", "preference": 0.0}, {"annotator": "b"})
