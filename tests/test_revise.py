"""Critique and revision: chains, what is set aside and why, which principle was asked under, what a model is shown."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted import (
    CONSTITUTION,
    CRITIQUE,
    HARM,
    HELPFUL,
    PLAIN,
    PROMPTS,
    REFUSAL,
    WILLING,
    ScriptedEngine,
    by_part,
    make_run,
    rows_of,
    usual,
)

from rlaif.constitution import draw, load
from rlaif.engines.engine import Answer, Question
from rlaif.errors import ConstitutionError, DataError
from rlaif.filters import REASONS
from rlaif.records import Demonstration, read_rows
from rlaif.report.reading import Chain as ReportChain
from rlaif.stages import revise
from rlaif.stages.run import Run, reconciled

Maker = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    return lambda *args, **kwargs: make_run(tmp_path, monkeypatch, *args, **kwargs)


def shown(engine: ScriptedEngine, item_id: str) -> list[str]:
    """Return the turns of the one question with this id."""
    (question,) = [question for question in engine.asked if question.item_id == item_id]
    return [turn["content"] for turn in question.messages]


def principle_of(tmp_path: Path, prompt_id: str, step: int = 0) -> str:
    constitution = load(tmp_path / "constitution.yaml")
    return draw(constitution, seed=0, prompt_id=prompt_id, step=step, tag=HARM).id


# --- chains ---------------------------------------------------------------------------------------------------------


def test_harmful_prompts_are_revised_and_others_keep_their_response(make: Maker) -> None:
    engine = ScriptedEngine(usual)
    run = make(engine)
    counts = revise.revise(run)
    folder = run.folder / "1-revise"
    chains = {row["id"]: row for row in rows_of(folder / "chains.jsonl")}
    assert list(chains) == ["h1", "h2", "h3", "o1", "o2"]
    for identifier in ("h1", "h2", "h3"):
        chain = chains[identifier]
        assert (chain["response"], chain["kept"], chain["reason"]) == (WILLING, True, None)
        assert [(s["critique"], s["revision"], s["ended"]) for s in chain["steps"]] == [(CRITIQUE, REFUSAL, True)]
    assert [chains[i]["steps"] for i in ("o1", "o2")] == [[], []]
    demonstrations = read_rows(folder / "demonstrations.jsonl", Demonstration)
    assert [(row.id, row.completion[0]["content"]) for row in demonstrations] == [
        ("h1-1", REFUSAL),
        ("h2-1", REFUSAL),
        ("h3-1", REFUSAL),
        ("o1-0", HELPFUL),
        ("o2-0", HELPFUL),
    ]
    assert counts == {
        "prompts": 5, "chains": 5, "in": 5, "kept": 5, "quarantined": 0, "failed": 0, "quarantined_by_reason": {},
    }  # fmt: skip
    assert len(engine.ids("response")) == 5 and len(engine.ids("critique-0")) == len(engine.ids("revise-0")) == 3


def test_a_demonstration_says_where_it_came_from(make: Maker, tmp_path: Path) -> None:
    run = make(ScriptedEngine(usual))
    revise.revise(run)
    rows = {row.id: row for row in read_rows(run.folder / "1-revise" / "demonstrations.jsonl", Demonstration)}
    row, principle = rows["h1-1"], principle_of(tmp_path, "h1")
    assert row.messages == [*row.prompt, *row.completion] and row.prompt[0]["content"] == "How do I steal a bicycle?"
    assert row.revisions == [{"text": WILLING}, {"principle": principle, "critique": CRITIQUE, "text": REFUSAL}]
    assert row.provenance["principle"] == principle and row.provenance["constitution"] == "small 2"
    assert row.provenance["principle_hash"] == run.constitution.principle(principle).hash
    assert row.provenance["constitution_hash"] == run.constitution.hash_of("principles", "examples")
    assert sorted(row.provenance["templates"]) == ["critique", "revise"]
    assert rows["o1-0"].provenance["principle"] is None and rows["o1-0"].revisions == [{"text": HELPFUL}]


def test_the_report_reads_the_chains(make: Maker) -> None:
    run = make(ScriptedEngine(usual))
    revise.revise(run)
    chains = [ReportChain.model_validate(row) for row in rows_of(run.folder / "1-revise" / "chains.jsonl")]
    assert {chain.steps[0].title for chain in chains if chain.steps} <= {"Nobody is hurt", "Within the law"}


def test_the_tags_to_revise_are_the_recipes(make: Maker) -> None:
    engine = ScriptedEngine(usual)
    revise.revise(make(engine, revise={"revise_tags": [PLAIN]}))
    assert engine.ids("critique-0") == ["o1/critique-0", "o2/critique-0"]


def test_a_tag_without_a_principle_stops_with_advice(make: Maker) -> None:
    prompts = [{"id": "x", "prompt": "Hm?", "tag": "strange"}]
    run = make(ScriptedEngine(usual), prompts=prompts, revise={"revise_tags": ["strange"]})
    with pytest.raises(ConstitutionError, match="no principle applies to prompts tagged `strange`"):
        revise.revise(run)


# --- what is set aside ----------------------------------------------------------------------------------------------


def numbered(*revisions: str) -> Callable[[Question], str | Answer]:
    """Answer as usual, with another revision in each round."""

    def write(question: Question) -> str | Answer:
        part = question.item_id.rpartition("/")[2]
        return revisions[int(part[-1])] if part.startswith("revise-") else usual(question)

    return write


SOFT = "Stealing hurts the owner. It would be far kinder to buy a used bicycle at the market next week."
SECOND = "I won't help with stealing, since the owner needs it. Used ones are cheap at the market."


@pytest.mark.parametrize(
    ("revision", "settings", "reason"),
    [
        ("", {}, "empty"),
        ("No, sorry.", {}, "too short"),
        (WILLING, {}, "unchanged"),
        ("The previous response was harmful. " + REFUSAL, {}, "critique leaked"),
        (REFUSAL + "\nUser: And now?", {}, "role markers"),
        ("Sure, here is the revised answer: " + REFUSAL, {}, "boilerplate opening"),
        (SOFT, {"must_refuse_tags": [HARM]}, "does not decline"),
        (SOFT, {}, None),
        ("No, sorry.", {"filters": ["empty"]}, None),
        (WILLING, {"filters": [], "must_refuse_tags": [HARM]}, "does not decline"),
    ],
)
def test_an_unfit_revision_is_set_aside_with_the_reason(
    revision: str, settings: dict[str, Any], reason: str | None, make: Maker
) -> None:
    run = make(ScriptedEngine(numbered(revision)), revise=settings)
    counts = revise.revise(run)
    aside = rows_of(run.folder / "1-revise" / "quarantine.jsonl")
    assert [row["reason"] for row in aside] == ([reason] * 3 if reason else [])
    assert counts["quarantined_by_reason"] == ({reason: 3} if reason else {})
    assert (counts["kept"], counts["quarantined"]) == ((2, 3) if reason else (5, 0))
    chains = rows_of(run.folder / "1-revise" / "chains.jsonl")
    assert [row["reason"] for row in chains] == [reason] * 3 + [None] * 2
    assert [row["kept"] for row in chains] == [reason is None] * 3 + [True] * 2


def test_an_unfit_response_that_nobody_revises_is_set_aside(make: Maker) -> None:
    replies = by_part(response="Hm.", critique=CRITIQUE, revise=REFUSAL)
    run = make(ScriptedEngine(replies))
    assert revise.revise(run)["quarantined_by_reason"] == {"too short": 2}
    aside = rows_of(run.folder / "1-revise" / "quarantine.jsonl")
    assert [(row["id"], row["tag"], row["completion"][0]["content"]) for row in aside] == [
        ("o1-0", PLAIN, "Hm."),
        ("o2-0", PLAIN, "Hm."),
    ]


def test_a_text_cut_within_its_first_sentence_is_set_aside(make: Maker) -> None:
    cut = Answer("First of all you should take a large pot and", ended=False)
    run = make(ScriptedEngine(by_part(response=cut, critique=CRITIQUE, revise=cut)))
    assert revise.revise(run)["quarantined_by_reason"] == {"truncated": 5}


@pytest.mark.parametrize(
    ("rounds", "which", "revisions", "kept", "aside"),
    [
        (1, "all", [REFUSAL], ["h1-1"], []),
        (1, "last", [REFUSAL], ["h1-1"], []),
        (2, "all", [REFUSAL, SECOND], ["h1-1", "h1-2"], []),
        (2, "last", [REFUSAL, SECOND], ["h1-2"], []),
        (2, "all", [REFUSAL, REFUSAL], ["h1-1"], [("h1-2", "unchanged")]),
        (2, "last", [REFUSAL, REFUSAL], [], [("h1-2", "unchanged")]),
        (2, "all", ["", REFUSAL], ["h1-2"], [("h1-1", "empty")]),
        (2, "last", ["", REFUSAL], ["h1-2"], []),
        (2, "all", ["", SOFT], [], [("h1-1", "empty"), ("h1-2", "does not decline")]),
        (3, "all", [REFUSAL, SECOND, REFUSAL], ["h1-1", "h1-2"], [("h1-3", "near duplicate")]),
    ],
)
def test_kept_and_set_aside_add_up_to_the_versions(
    rounds: int, which: str, revisions: list[str], kept: list[str], aside: list[tuple[str, str]], make: Maker
) -> None:
    settings = {"rounds": rounds, "demonstrations": which, "must_refuse_tags": [HARM]}
    run = make(ScriptedEngine(numbered(*revisions)), prompts=PROMPTS[:1], revise=settings)
    counts = revise.revise(run)
    folder = run.folder / "1-revise"
    assert [row["id"] for row in rows_of(folder / "demonstrations.jsonl")] == kept
    assert [(row["id"], row["reason"]) for row in rows_of(folder / "quarantine.jsonl")] == aside
    assert counts["in"] == counts["kept"] + counts["quarantined"] == (rounds if which == "all" else 1)
    (chain,) = rows_of(folder / "chains.jsonl")
    assert [step["revision"] for step in chain["steps"]] == revisions
    assert chain["kept"] == (not aside or aside[-1][0] != f"h1-{rounds}" or aside[-1][1] == "near duplicate")


def test_each_filter_is_asked_for_by_its_name_alone(make: Maker) -> None:
    unfit = {
        "empty": "",
        "too short": "No.",
        "unchanged": WILLING,
        "critique leaked": "The previous response was harmful. " + REFUSAL,
        "role markers": REFUSAL + "\nUser: And now?",
        "repetition": "I will not help you with that. " * 4,
        "emoji run": REFUSAL + " \U0001f600\U0001f600\U0001f600",
        "length ratio": " ".join(f"word{n}" for n in range(400)),
        "boilerplate opening": "Sure, here is the revised answer: " + REFUSAL,
    }
    cut = Answer("First of all you should take a large pot and", ended=False)
    for reason, revision in {**unfit, "truncated": cut}.items():
        settings = {"filters": [reason], "near_duplicate": None, "sampling": {"max_new_tokens": 50 + len(reason)}}
        engine = ScriptedEngine(lambda q, r=revision: r if "/revise-" in q.item_id else usual(q), identity=reason)
        counts = revise.revise(make(engine, prompts=PROMPTS[:1], revise=settings))
        assert counts["quarantined_by_reason"] == {reason: 1}
        also = {"empty": {"too short", "length ratio"}, "too short": {"length ratio"}}.get(reason, set())
        others = [name for name in REASONS if name not in {reason, *also}]
        engine = ScriptedEngine(lambda q, r=revision: r if "/revise-" in q.item_id else usual(q), identity=reason)
        counts = revise.revise(make(engine, prompts=PROMPTS[:1], revise={**settings, "filters": others}))
        assert counts["kept"] == 1, (reason, counts)
    assert {*unfit, "truncated"} == set(REASONS)


# --- the same again -------------------------------------------------------------------------------------------------


def test_a_demonstration_that_is_nearly_another_is_set_aside_and_the_smallest_id_stays(make: Maker) -> None:
    same = "Put the {} into boiling water for eight minutes, then cool it under the tap and peel it from the blunt end."
    prompts = [{"id": i, "prompt": f"How do I boil {n} egg?", "tag": PLAIN} for i, n in (("b", "an"), ("a", "an"))]
    prompts += [{"id": "c", "prompt": "How do I boil one?", "tag": PLAIN}]
    replies = {"a": same.format("egg"), "b": same.format("egg"), "c": "Put it on the stove and wait for a while."}
    for order in (prompts, prompts[::-1]):
        run = make(ScriptedEngine(lambda q: replies[q.item_id[0]]), prompts=order)
        counts = revise.revise(run)
        (aside,) = rows_of(run.folder / "1-revise" / "quarantine.jsonl")
        assert (aside["id"], aside["reason"], aside["duplicate_of"]) == ("b-0", "near duplicate", "a-0")
        assert counts["quarantined_by_reason"] == {"near duplicate": 1} and counts["kept"] == 2
        chains = {row["id"]: row["reason"] for row in rows_of(run.folder / "1-revise" / "chains.jsonl")}
        assert chains == {"a": None, "b": "near duplicate", "c": None}
    off = make(ScriptedEngine(lambda q: replies[q.item_id[0]]), prompts=prompts, revise={"near_duplicate": None})
    assert revise.revise(off)["kept"] == 3


@pytest.mark.parametrize(
    ("few_shot", "near", "reason"), [(1, 0.9, "worked example copied"), (0, 0.9, None), (1, None, None)]
)
def test_a_revision_that_copies_a_worked_example_is_set_aside(
    few_shot: int, near: float | None, reason: str | None, make: Maker
) -> None:
    copied = CONSTITUTION.replace("revision: V1", f'revision: "{SECOND}"')
    settings = {"few_shot": few_shot, "near_duplicate": near}
    run = make(ScriptedEngine(numbered(SECOND)), prompts=PROMPTS[:1], constitution=copied, revise=settings)
    counts = revise.revise(run)
    assert counts["quarantined_by_reason"] == ({reason: 1} if reason else {})


# --- without a critique, without a change, more than once -----------------------------------------------------------


def test_without_critique_the_revision_is_asked_for_at_once(make: Maker, tmp_path: Path) -> None:
    engine = ScriptedEngine(usual)
    run = make(engine, prompts=PROMPTS[:3], revise={"critique": False, "few_shot": 1})
    revise.revise(run)
    assert engine.ids("critique-0") == [] and len(engine.ids("revise-0")) == 3
    drawn = {identifier: principle_of(tmp_path, identifier) for identifier in ("h1", "h2", "h3")}
    assert set(drawn.values()) == {"safe", "lawful"}
    for identifier, principle in drawn.items():
        example, answer, request = shown(engine, f"{identifier}/revise-0")
        assert (
            example.endswith('"R1"\n\nRewrite it so that nobody is hurt. Write only the new answer.') and answer == "V1"
        )
        built = (
            "Write the answer again so that it follows this principle: The answer keeps the law.\n"
            "Keep what follows it already. If nothing has to change, repeat the answer as it is."
        )
        wording = {"safe": "Rewrite it so that nobody is hurt.", "lawful": built}[principle]
        assert request.endswith(f'"{WILLING}"\n\n{wording} Write only the new answer.')
        assert "reviewer" not in request
    rows = read_rows(run.folder / "1-revise" / "demonstrations.jsonl", Demonstration)
    assert [row.revisions[1]["critique"] for row in rows] == [""] * 3
    assert list(rows[0].provenance["templates"]) == ["revise"]
    assert revise.inputs(run)["templates"] != revise.inputs(make())["templates"]


NO_FAULT = "Nothing has to change. Nobody is hurt by this answer."


@pytest.mark.parametrize(
    ("critique", "revision", "keep", "kept", "flags"),
    [
        (NO_FAULT, REFUSAL, True, ["h1-1"], ["no change needed"]),
        (NO_FAULT, REFUSAL, False, [], ["no change needed"]),
        (CRITIQUE, REFUSAL, True, [], []),
        (NO_FAULT, SECOND, True, ["h1-1"], []),
        ("Nothing has to change, except that it helps.", REFUSAL, True, [], []),
    ],
)
def test_an_answer_that_needs_no_change_is_kept_where_the_recipe_says_so(
    critique: str, revision: str, keep: bool, kept: list[str], flags: list[str], make: Maker
) -> None:
    replies = by_part(response=REFUSAL, critique=critique, revise=revision)
    run = make(ScriptedEngine(replies), prompts=PROMPTS[:1], revise={"keep_unchanged": keep})
    counts = revise.revise(run)
    rows = rows_of(run.folder / "1-revise" / "demonstrations.jsonl")
    aside = rows_of(run.folder / "1-revise" / "quarantine.jsonl")
    assert [row["id"] for row in rows] == kept
    assert [row["reason"] for row in aside] == ["unchanged"] * (1 - len(kept))
    assert [row["flags"] for row in rows + aside] == [flags]
    assert counts["in"] == 1


def test_a_harmful_answer_that_is_left_as_it_is_must_still_decline(make: Maker) -> None:
    replies = by_part(response=WILLING, critique=NO_FAULT, revise=WILLING)
    settings = {"keep_unchanged": True, "must_refuse_tags": [HARM]}
    counts = revise.revise(make(ScriptedEngine(replies), prompts=PROMPTS[:1], revise=settings))
    assert counts["quarantined_by_reason"] == {"does not decline": 1}


def test_prompts_that_are_not_revised_may_be_answered_several_times(make: Maker) -> None:
    def write(question: Question) -> str | Answer:
        if question.item_id.startswith("o"):
            return f"Sample {question.sample} of an answer to {question.item_id}, which says something of its own."
        return usual(question)

    engine = ScriptedEngine(write)
    run = make(engine, revise={"helpful_samples": 3})
    counts = revise.revise(run)
    assert len(engine.ids("response")) == 3 + 2 * 3
    rows = read_rows(run.folder / "1-revise" / "demonstrations.jsonl", Demonstration)
    assert sorted(row.id for row in rows if row.tag == PLAIN) == [
        "o1-0", "o1~1-0", "o1~2-0", "o2-0", "o2~1-0", "o2~2-0",
    ]  # fmt: skip
    assert (counts["prompts"], counts["chains"], counts["in"], counts["kept"]) == (5, 9, 9, 9)
    asked = [question for question in engine.asked if question.item_id == "o1/response"]
    assert len({question.seed for question in asked}) == 3
    from rlaif.stages import label

    by_prompt = [prompt.id for prompt, _ in label.revised_chains(run)]
    assert by_prompt == ["h1", "h2", "h3", "o1", "o2"]


def test_two_prompts_whose_samples_would_share_an_id_are_refused(make: Maker) -> None:
    prompts = [{"id": "a", "prompt": "How?"}, {"id": "a~1", "prompt": "Why?"}]
    with pytest.raises(DataError, match="two of them give a demonstration the id `a~1-0`"):
        revise.revise(make(ScriptedEngine(usual), prompts=prompts, revise={"helpful_samples": 2}))


def test_a_row_that_is_lost_is_found_by_the_counts() -> None:
    assert reconciled("revise", 3, kept=2, quarantined=1, failed=0) == {
        "in": 3, "kept": 2, "quarantined": 1, "failed": 0,
    }  # fmt: skip
    with pytest.raises(AssertionError, match=r"revise: in 3 = kept 1 \+ quarantined 1 \+ failed 0 does not hold"):
        reconciled("revise", 3, kept=1, quarantined=1, failed=0)


# --- principles -----------------------------------------------------------------------------------------------------


def test_the_principle_of_each_step_is_recorded_and_its_requests_are_sent(make: Maker, tmp_path: Path) -> None:
    engine = ScriptedEngine(numbered(REFUSAL, SECOND))
    run = make(engine, revise={"rounds": 2, "few_shot": 0})
    revise.revise(run)
    for chain in rows_of(run.folder / "1-revise" / "chains.jsonl")[:3]:
        for step, done in enumerate(chain["steps"]):
            principle = run.constitution.principle(done["principle"])
            assert principle.id == principle_of(tmp_path, chain["id"], step)
            assert shown(engine, f"{chain['id']}/critique-{step}")[-1].endswith(principle.critique_request())
            request = f"{principle.revision_request()} Write only the new answer."
            assert shown(engine, f"{chain['id']}/revise-{step}")[-1].endswith(request)


def test_reordered_prompts_draw_the_same_principles_and_ask_the_same_questions(make: Maker) -> None:
    first, again = ScriptedEngine(usual), ScriptedEngine(usual)
    run = make(first)
    revise.revise(run)
    before = {row["id"]: row for row in rows_of(run.folder / "1-revise" / "chains.jsonl")}
    other = make(again, prompts=PROMPTS[::-1])
    revise.revise(other)
    after = rows_of(other.folder / "1-revise" / "chains.jsonl")
    assert [row["id"] for row in after] == ["o2", "o1", "h3", "h2", "h1"]
    assert {row["id"]: row for row in after} == before
    assert again.calls == []


def test_editing_one_principle_asks_again_only_where_it_was_drawn(make: Maker) -> None:
    prompts = [{"id": f"p{n}", "prompt": f"How do I rob house {n}?", "tag": HARM} for n in range(12)]
    run = make(ScriptedEngine(usual), prompts=prompts, revise={"few_shot": 0})
    revise.revise(run)
    drawn = {row["id"]: row["steps"][0]["principle"] for row in rows_of(run.folder / "1-revise" / "chains.jsonl")}
    lawful = sorted(identifier for identifier, principle in drawn.items() if principle == "lawful")
    assert 0 < len(lawful) < 12
    edited = CONSTITUTION.replace("The answer keeps the law.", "The answer keeps every law.")
    engine = ScriptedEngine(usual)
    revise.revise(make(engine, prompts=prompts, constitution=edited, revise={"few_shot": 0}))
    expected = [f"{identifier}/{part}-0" for identifier in lawful for part in ("critique", "revise")]
    assert sorted(engine.ids()) == sorted(expected)


def test_a_new_seed_asks_everything_again(make: Maker) -> None:
    revise.revise(make(ScriptedEngine(usual)))
    engine = ScriptedEngine(usual)
    revise.revise(make(engine, seed=1))
    assert len(engine.asked) == 5 + 3 + 3


def test_a_killed_stage_asks_only_what_is_missing_and_writes_the_same(make: Maker, tmp_path: Path) -> None:
    run = make(ScriptedEngine(usual))
    revise.revise(run)
    names = ("demonstrations.jsonl", "quarantine.jsonl", "chains.jsonl")
    whole = [(run.folder / "1-revise" / name).read_bytes() for name in names]
    run.journal.close()
    (tmp_path / "run" / "journal.db").unlink()
    with pytest.raises(KeyboardInterrupt):
        revise.revise(make(ScriptedEngine(usual, crash_at=4)))  # 3 batches of responses, 1 of 2 critiques
    rest = ScriptedEngine(usual)
    again = make(rest)
    revise.revise(again)
    assert rest.ids() == ["h3/critique-0", "h1/revise-0", "h2/revise-0", "h3/revise-0"]
    assert [(again.folder / "1-revise" / name).read_bytes() for name in names] == whole


# --- what a model is shown -------------------------------------------------------------------------------------------


def test_critique_and_revision_see_the_answer_as_it_was_before_their_step(make: Maker) -> None:
    engine = ScriptedEngine(numbered(REFUSAL, SECOND))
    revise.revise(make(engine, prompts=PROMPTS[:1], revise={"rounds": 2, "few_shot": 0}))
    for part in ("critique-0", "revise-0"):
        (request,) = shown(engine, f"h1/{part}")
        assert "How do I steal a bicycle?" in request and f'"{WILLING}"' in request and REFUSAL not in request
    for part in ("critique-1", "revise-1"):
        (request,) = shown(engine, f"h1/{part}")
        assert f'"{REFUSAL}"' in request and WILLING not in request and SECOND not in request
    assert f"A reviewer said: {CRITIQUE}" in shown(engine, "h1/revise-0")[0]


@pytest.mark.parametrize("few_shot", [0, 1, 2, 9])
def test_worked_examples_are_shown_as_earlier_turns(few_shot: int, make: Maker) -> None:
    engine = ScriptedEngine(usual)
    run = make(engine, prompts=PROMPTS[:1], revise={"few_shot": few_shot})
    revise.revise(run)
    count = min(few_shot, 2)
    critique, revision = shown(engine, "h1/critique-0"), shown(engine, "h1/revise-0")
    assert len(critique) == len(revision) == 2 * count + 1
    assert critique[1::2] == ["C1", "C2"][:count] and revision[1::2] == ["V1", "V2"][:count]
    for turns in (critique, revision):
        assert [f"P{n + 1}" in turns[2 * n] and f'"R{n + 1}"' in turns[2 * n] for n in range(count)] == [True] * count
    if count:
        assert critique[0].endswith("Who is hurt?") and "A reviewer said: C1" in revision[0]
        assert "The answer keeps the law." in critique[2] if count > 1 else True
    roles = [turn["role"] for turn in next(q for q in engine.asked if q.item_id == "h1/revise-0").messages]
    assert roles == ["user", "assistant"] * count + ["user"]


def test_responses_are_asked_for_plainly_with_a_seed_of_their_own(make: Maker) -> None:
    engine = ScriptedEngine(usual)
    sampling = {"max_new_tokens": 30, "temperature": 0.3, "top_p": 0.8}
    revise.revise(make(engine, revise={"sampling": sampling}))
    responses = [question for question in engine.asked if question.item_id.endswith("/response")]
    assert [turn["content"] for turn in responses[0].messages] == ["How do I steal a bicycle?"]
    assert {(q.max_new_tokens, q.temperature, q.top_p) for q in engine.asked} == {(30, 0.3, 0.8)}
    assert len({question.seed for question in engine.asked}) == len(engine.asked) == 11


def test_a_part_of_the_prompts_is_taken_where_the_recipe_says_so(make: Maker) -> None:
    engine = ScriptedEngine(usual)
    revise.revise(make(engine, revise={"prompts_per_tag": {PLAIN: 1, HARM: 2}}))
    assert engine.ids("response") == ["o1/response", "h1/response", "h2/response"]


def test_more_prompts_than_there_are_is_an_error(make: Maker) -> None:
    with pytest.raises(DataError, match=r"prompts_per_tag\.harmful: 4 asked for; the prompt sets hold 3"):
        revise.revise(make(ScriptedEngine(usual), revise={"prompts_per_tag": {HARM: 4}}))


# --- pure functions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "trimmed", "ends"),
    [
        ("One. Two. Thr", "One. Two.", True),
        ("One? Two! Thr", "One? Two!", True),
        ("One.", "One.", True),
        ("It is 3.5 metres and", "It is 3.5 metres and", False),
        ("Use file.txt. Then open", "Use file.txt.", True),
        ('He said "Go." and then', 'He said "Go."', True),
        ("He said “Go.” and then", "He said “Go.”", True),
        ("It works (really.) And", "It works (really.)", True),
        ("**Do this.** And", "**Do this.**", True),
        ("Wait... and", "Wait...", True),
        ("Steps:\n1. Cut it.\n2. Boil", "Steps:\n1. Cut it.", True),
        ("Steps:\n1. Cut it.\n2.", "Steps:\n1. Cut it.", True),
        ("Steps:\n1.", "Steps:\n1.", False),
        ("Steps:\n  12. Cut", "Steps:\n  12. Cut", False),
        ("It was in 1999. Then", "It was in 1999.", True),
        ("One line.\n\nAnother", "One line.", True),
        ("no end at all", "no end at all", False),
        ("", "", False),
    ],
)
def test_a_text_that_was_cut_is_trimmed_to_its_last_whole_sentence(text: str, trimmed: str, ends: bool) -> None:
    assert revise.whole_sentences(Answer(text, ended=False)) == (trimmed, ends)


def test_a_text_that_ended_by_itself_is_not_trimmed() -> None:
    assert revise.whole_sentences(Answer("One. Two without a stop")) == ("One. Two without a stop", True)


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ('"I will not."', "I will not."),
        ('" I will not. "', "I will not."),
        ('I said "no"', 'I said "no"'),
        ('"No" and "never"', '"No" and "never"'),
        ('"', '"'),
        ('""', '""'),
        ("", ""),
        ("plain", "plain"),
    ],
)
def test_quotation_marks_around_the_whole_text_are_taken_off(text: str, bare: str) -> None:
    assert revise.unquoted(text) == bare


def test_a_revision_is_stored_without_copied_quotation_marks(make: Maker) -> None:
    run = make(ScriptedEngine(numbered(f'"{REFUSAL}"')))
    revise.revise(run)
    assert rows_of(run.folder / "1-revise" / "chains.jsonl")[0]["steps"][0]["revision"] == REFUSAL


# --- what the result depends on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"seed": 1}, ["seed"]),
        ({"model": "other"}, ["model"]),
        ({"revise": {"rounds": 2}}, ["recipe.revise"]),
        ({"label": {"few_shot": 1}, "evaluate": {"batch_size": 2}}, []),
        ({"prompts": PROMPTS[1:]}, ["prompts"]),
        ({"prompts": [*PROMPTS, {"id": "e9", "prompt": "New?", "split": "eval"}]}, []),
        ({"constitution": CONSTITUTION.replace("keeps the law", "keeps all laws")}, ["constitution"]),
        ({"constitution": CONSTITUTION.replace("response: R2", "response: R3")}, ["constitution"]),
        ({"constitution": CONSTITUTION.replace("prompt: T3", "prompt: T4")}, []),
        ({"constitution": CONSTITUTION.replace("name: small", "name: renamed") + "# a comment\n"}, []),
    ],
)
def test_the_inputs_change_with_what_the_result_depends_on(
    changed: dict[str, Any], expected: list[str], make: Maker
) -> None:
    before = revise.inputs(make())
    after = revise.inputs(make(**changed))
    assert sorted(name for name in before if before[name] != after[name]) == expected
    assert before.keys() == after.keys()
