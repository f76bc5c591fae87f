"""Rounds: their steps and folders, what later ones start from and learn again, the gate, and being cut off in one."""

import json
import re
import shutil
from unittest.mock import MagicMock

import pytest
import tiny_runs
from typer.testing import CliRunner

from rlaif import rounds, trace, tree
from rlaif.chat import Conversation
from rlaif.cli import app
from rlaif.errors import ConfigError, StageError
from rlaif.pipeline import run_recipe
from rlaif.plan import plan
from rlaif.ppo_section import ConstraintSection
from rlaif.progress import Progress
from rlaif.recipe import load_recipe
from rlaif.records import Comparison, assistant
from rlaif.report.rounds import Gate
from rlaif.report.run import write_report
from rlaif.rounds import Step
from rlaif.stages import candidates, evaluate, gate, label, ppo, replay, revise, reward, sft
from rlaif.stages.reward_data import Known, prompt_key, split_rows

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")

LLAMA = ["revise", "sft", "label", "reward", "rejection", "ppo", "evaluate"]
SMALL = {
    "stages": LLAMA,
    "rounds": {"count": 2, "replay": 0.5, "gate": "score"},
    "revise": {"prompts_per_tag": {"harmful": 4, "ordinary": 4}},
    "sft": {"max_steps": 2},
    "label": {"prompts_per_tag": {"harmful": 4, "ordinary": 4}},
    "reward": {"max_steps": 2, "heldout_fraction": 0.4},
    "ppo": {"updates": 2},
    "rejection": {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "prompts_per_tag": {"harmful": 2, "ordinary": 2},
        "samples_per_prompt": 2,
        "sampling": {"max_new_tokens": 8},
    },
    "evaluate": {"judge_prompts_per_tag": 0, "prompts_per_tag": {"harmful": 3, "ordinary": 3}},
}
# No model judges or rewards: what is left are the policies of rounds.
BARE = {
    "stages": ["ppo", "evaluate"],
    "rounds": {"count": 2, "gate": "score"},
    "ppo": {"updates": 1, "reward_function": "brief"},
    "evaluate": {"judge_prompts_per_tag": 0, "prompts_per_tag": {"harmful": 3, "ordinary": 3}},
}


def loaded(folder, tiny_model, **changes):
    return load_recipe(tiny_runs.write_recipe(folder / "tiny.yaml", tiny_model, **changes))


def said_by(recipe, **options):
    said = []
    progress = Progress(quiet=True)
    progress.say = said.append
    run_recipe(recipe, progress, **options)
    return [line for line in said if re.match(r"(round-\d/)?\d-", line)]


# --- steps ------------------------------------------------------------------------------------------------------------


def test_stages_after_sft_come_again_in_each_round():
    steps = rounds.steps_of(["revise", "sft", "label", "ppo", "evaluate"], 3)
    assert [str(step) for step in steps] == [
        *("revise", "sft", "label", "ppo", "evaluate"),
        *("round-2/label", "round-2/ppo", "round-2/evaluate"),
        *("round-3/label", "round-3/ppo", "round-3/evaluate"),
    ]


def test_a_plain_name_is_that_of_the_first_round():
    steps = rounds.steps_of(["label", "ppo"], 2)
    assert rounds.chosen(steps, "x", "ppo", "round-2/label") == (
        [Step(1, "label"), Step(1, "ppo"), Step(2, "label")],
        [Step(1, "ppo"), Step(2, "label")],
    )
    assert rounds.chosen(steps, "x", None, None, "round-2/ppo") == ([Step(2, "ppo")], [])
    with pytest.raises(ConfigError, match=r"x: has no stage `round-3/ppo`; its stages: label, ppo, round-2/label, r"):
        rounds.chosen(steps, "x", "round-3/ppo", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ["revise", "sft", "evaluate"]}, "rounds is 2, and no stage trains a policy in each"),
        ({"stages": ["revise", "sft", "label", "reward", "ppo"]}, "needs the stage `evaluate`"),
        ({"evaluate": {"judge_prompts_per_tag": 0}}, "rounds.gate is `judge`, and evaluate.judge_prompts_per_tag is 0"),
        (
            {"stages": ["revise", "sft", "label", "dpo", "evaluate"], "rounds": {"count": 2, "gate": "score"}},
            "no reward to score with",
        ),
        ({"label": {"candidates": "policies"}}, "label.candidates is `policies`, whose pairs are the same in each"),
        ({"rounds": {"count": 0}}, "rounds.count"),
        ({"rounds": {"count": 2, "replay": 1.5}}, "rounds.replay"),
    ],
)
def test_rounds_that_could_not_learn_or_be_compared_are_refused(tmp_path, tiny_model, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        loaded(tmp_path, tiny_model, **{"rounds": 2, **changes})


def test_rejection_may_stand_just_before_ppo(tmp_path, tiny_model):
    assert loaded(tmp_path, tiny_model, stages=LLAMA).recipe.stages == LLAMA
    with pytest.raises(ConfigError, match="`rejection` may stand just before `ppo`"):
        loaded(tmp_path, tiny_model, stages=["revise", "sft", "rejection", "label", "reward", "ppo"])


def test_the_policy_that_was_trained_last_comes_last_in_evaluate_and_is_what_chat_talks_to(tmp_path, monkeypatch):
    monkeypatch.setattr("rlaif.chat.SharedBase", MagicMock())
    for stages, title in (
        (LLAMA, "after PPO"),
        ([*LLAMA[:4], "ppo", "rejection", "evaluate"], "after rejection sampling"),
    ):
        folder = tmp_path / title
        with tiny_runs.opened(folder, "none", stages=stages) as run:
            for place in ("2-sft/adapter", "5-ppo/policy", "8-rejection/policy"):
                (run.folder / place).mkdir(parents=True)
            assert list(evaluate.adapters(run)) == [
                "base",
                *(one for one in stages if one in ("sft", "ppo", "rejection")),
            ]
            tiny_runs.write_recipe(run.folder / "recipe.yaml", "none", stages=stages)
            assert Conversation(run.folder, max_new_tokens=2, temperature=0.0).title == title


def test_the_first_of_several_rounds_depends_on_what_a_single_one_does(tmp_path, tiny_model):
    stages = (revise, sft, label, reward, ppo, evaluate)
    with tiny_runs.opened(tmp_path / "one", tiny_model) as run:
        single = [stage.inputs(run) for stage in stages]
        seed = run.seed("x", 1)
    with tiny_runs.opened(tmp_path / "two", tiny_model, rounds={"count": 2, "replay": 0.3}) as run:
        assert [stage.inputs(run) for stage in stages] == single
        assert run.seed("x", 1) == seed != run.in_round(2).seed("x", 1)
        assert run.in_round(2).stage_folder("ppo") == run.folder / "round-2" / "5-ppo"
        assert run.in_round(2).stage_folder("sft") == run.folder / "2-sft"


def test_the_newest_reward_model_is_that_of_the_last_round_that_has_finished_it(tmp_path):
    for name in ("4-reward", "round-2/4-reward", "round-3/4-reward"):
        (tmp_path / name).mkdir(parents=True)
    assert rounds.newest_of(tmp_path, "4-reward") == tmp_path / "4-reward"
    (tmp_path / "round-2" / "4-reward" / "manifest.json").write_text("{}")
    assert rounds.newest_of(tmp_path, "4-reward") == tmp_path / "round-2" / "4-reward"


# --- replay -----------------------------------------------------------------------------------------------------------


def row(prompt, answer="yes", **columns):
    turns = [{"role": "user", "content": prompt}]
    about = {"preference": 1.0, "source": "ai", "annotator": "judge", "tag": "t"}
    sides = {"prompt": turns, "chosen": assistant(answer), "rejected": assistant("no")}
    return Comparison(id=f"{prompt}-{answer}", **sides, **about, **columns)


def test_no_prompt_changes_sides_between_rounds_whatever_else_is_labelled():
    first = [row(f"p{index}") for index in range(10)]
    second = [row(f"p{index}", "maybe") for index in range(3, 20)]
    before = split_rows(first, 0.3)
    known = replay.known_sides([first], 0.3)
    after = split_rows([*second, *first], 0.3, known=known)
    trained, heldout = ({prompt_key(one) for one in part} for part in (before.train, before.heldout))
    assert len(heldout) == 3
    assert trained & {prompt_key(one) for one in after.heldout} == set()
    assert heldout & {prompt_key(one) for one in after.train} == set()
    new = {prompt_key(one) for one in after.heldout} - heldout
    assert len(new) == 3  # of the ten prompts that no round had before, the share and no more
    third = replay.known_sides([first, second], 0.3)
    assert third == Known(frozenset(map(prompt_key, after.train)), frozenset(map(prompt_key, after.heldout)))


def test_a_mark_does_not_hold_out_what_an_earlier_round_has_trained_on():
    known = Known(train=frozenset([prompt_key(row("seen"))]))
    split = split_rows([row("seen", split="eval"), row("new", split="eval"), row("other")], 0.5, known=known)
    assert [one.id for one in split.heldout] == ["new-yes"]


def test_a_share_of_earlier_rows_is_learned_again_and_none_that_the_round_has(tmp_path, tiny_model):
    rows = [row(f"p{index}") for index in range(200)]
    with tiny_runs.opened(tmp_path, tiny_model, rounds={"count": 3, "replay": 0.25}) as run:
        drawn = replay.replayed(run.in_round(3), [rows, rows[:50]], rows[:20])
        again = replay.replayed(run.in_round(3), [rows, rows[:50]], rows[:20])
    assert drawn == again
    assert 25 < len(drawn) < 70
    assert not {one.id for one in drawn} & {one.id for one in rows[:20]}
    assert len({one.id for one in drawn}) == len(drawn)


# --- the gate ---------------------------------------------------------------------------------------------------------


def win(policy, against, rate, low, high):
    counts = {"n": 20, "wins": 4, "losses": 16, "ties": 0, "failed": 0}
    return {"policy": policy, "against": against, "rate": rate, "low": low, "high": high, **counts}


def evaluated(run, wins=(), scores=()):
    folder = run.stage_folder("evaluate")
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"win_rates": list(wins)}))
    lines = [json.dumps({"policy": policy, "prompt_id": prompt, "score": score}) for policy, prompt, score in scores]
    (folder / "responses.jsonl").write_text("".join(f"{line}\n" for line in lines))


def adapter(folder, text):
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_text(text)
    return folder


@pytest.fixture
def gated(tmp_path, tiny_model):
    with tiny_runs.opened(tmp_path, tiny_model, rounds=2) as run:
        adapter(run.stage_folder("sft") / "adapter", "sft")
        adapter(run.stage_folder("ppo") / "policy", "ppo")
        yield run


@pytest.mark.parametrize(
    ("rate", "low", "high", "kept"),
    [(0.2, 0.1, 0.49, "sft"), (0.4, 0.2, 0.6, "ppo"), (0.8, 0.6, 0.9, "ppo"), (None, None, None, "sft")],
)
def test_a_policy_is_dropped_where_the_judge_shows_that_it_is_worse_or_compares_nothing(gated, rate, low, high, kept):
    evaluated(gated, [win("ppo", "base", 0.9, 0.8, 1.0), win("ppo", "sft", rate, low, high)])
    decided = gate.decide(gated)
    assert decided["kept"]["stage"] == kept
    assert (gated.folder / "policy" / "adapter_model.safetensors").read_text() == kept
    assert json.loads((gated.folder / "gate.json").read_text()) == decided
    start = gate.kept_policy(gated.in_round(2))
    assert start.adapter == gated.stage_folder(kept) / ("adapter" if kept == "sft" else "policy")


@pytest.mark.parametrize(
    ("n", "said"),
    [
        (3, "30% to 70%; so few that no win rate would drop it: raise evaluate.judge_prompts_per_tag"),
        (6, "; below 10% a policy is dropped, which takes a collapse: raise evaluate.judge_prompts_per_tag"),
        (100, "30% to 70%; below 40% a policy is dropped"),
    ],
)
def test_the_gate_of_the_judge_says_what_so_many_comparisons_could_drop(gated, n, said):
    evaluated(gated, [win("ppo", "sft", 0.5, 0.3, 0.7) | {"n": n}])
    assert gate.decide(gated)["reason"].endswith(said)


def test_the_next_round_is_sampled_from_the_old_policy_after_a_regression(gated, monkeypatch):
    evaluated(gated, [win("ppo", "sft", 0.1, 0.0, 0.3)])
    gate.decide(gated)
    named = []
    monkeypatch.setattr(candidates.Engines, "_of", lambda self, folder, role="": named.append(folder))
    candidates.Engines(gated.in_round(2), base=object()).policy()
    assert named == [gated.stage_folder("sft") / "adapter"]
    assert gate.starting_policy(gated.in_round(2), "ppo").as_input("start") == {}


@pytest.mark.parametrize(("change", "kept"), [(-1.0, "sft"), (0.5, "ppo")])
def test_the_gate_of_scores_compares_the_same_prompts(gated, change, kept):
    run = gated
    run.recipe.rounds.gate = "score"
    old = [("sft", f"p{index}", float(index)) for index in range(10)]
    new = [("ppo", f"p{index}", index + change + 0.01 * (index % 2)) for index in reversed(range(10))]
    evaluated(run, scores=[*old, *new, ("ppo", "alone", 99.0), ("base", "p0", 50.0)])
    decided = gate.decide(run)
    assert decided["kept"]["stage"] == kept
    assert decided["n"] == 10
    assert decided["difference"] == pytest.approx(change + 0.005)


@pytest.mark.parametrize(
    ("new", "old", "kept"),
    [(2.0, 1.0, "sft"), (2.0, 2.1, "ppo"), (0.9, 0.0, "ppo"), (1.02, 0.0, "ppo"), (None, None, "ppo")],
)
def test_the_gate_drops_a_policy_that_is_shown_to_break_the_limit_more_than_the_old_one(gated, new, old, kept):
    run = gated
    run.recipe.ppo.constraint = ConstraintSection(function="words", threshold=1.0)
    evaluated(run, [win("ppo", "sft", 0.8, 0.6, 0.9)])
    rows = [
        {"policy": policy, "prompt_id": f"p{index}", "cost": None if mean is None else mean + 0.1 * (index % 3 - 1)}
        for policy, mean in (("ppo", new), ("sft", old))
        for index in range(12)
    ]
    (run.stage_folder("evaluate") / "responses.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    decided = gate.decide(run)
    assert decided["kept"]["stage"] == kept
    assert decided["reason"].startswith("it wins 80%")
    assert ("no answer has a cost" if new is None else f"its mean cost is {new:.2f} where 1 is allowed") in decided[
        "reason"
    ]
    assert ("both shown to be more" in decided["reason"]) == (kept == "sft")
    assert decided["rate"] == 0.8
    shown = Gate.model_validate(decided).compared
    assert ("; cost " in shown) == (new is not None)


def test_a_later_round_is_compared_with_the_kept_policy_and_a_stage_that_runs_withdraws_its_gate(gated):
    evaluated(gated, [win("ppo", "sft", 0.8, 0.6, 0.9)])
    gate.decide(gated)
    later = gated.in_round(2)
    adapter(later.stage_folder("ppo") / "policy", "ppo of round 2")
    evaluated(later, [win("ppo", "sft", 0.9, 0.8, 1.0), win("ppo", "kept", 0.1, 0.0, 0.3)])
    decided = gate.decide(later)
    assert (decided["kept"]["round"], decided["kept"]["adapter"]) == (1, "5-ppo/policy")
    published = gated.folder / "policy" / "adapter_model.safetensors"
    before = published.stat().st_mtime_ns
    gate.decide(gated)  # of a round that is not the last to have ended
    assert published.read_text() == "ppo" and published.stat().st_mtime_ns == before
    gate.withdraw(later)
    assert rounds.gates(gated.folder, 2) == [gated.folder / "gate.json"]
    gate.withdraw(gated)
    with pytest.raises(StageError, match="written at the end of the round, after `evaluate`"):
        gate.kept_policy(later)


FOLDERS_OF_ROUND_1 = ("1-revise", "2-sft", "3-label", "4-reward", "8-rejection", "5-ppo", "6-evaluate")

# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory, tiny_model):
    return tiny_runs.whole_run(tmp_path_factory.mktemp("rounds") / "run", tiny_model, **SMALL)


def everything(folder):
    return tiny_runs.lasting(folder) | {"gate.json": (folder / "gate.json").read_bytes()}


@pytest.mark.slow
def test_each_round_starts_from_what_was_kept_and_trains_on_top(two_rounds):
    first, second = (json.loads((two_rounds / name / "gate.json").read_text()) for name in ("", "round-2"))
    assert first["new"] == {"stage": "ppo", "round": 1, "adapter": "5-ppo/policy"}
    assert second["old"] == first["kept"]
    manifest = json.loads((two_rounds / "round-2" / "4-reward" / "manifest.json").read_text())
    assert 0 < manifest["counts"]["replayed"] < 8
    assert manifest["inputs"]["comparisons.1"] != manifest["inputs"]["comparisons"]
    assert manifest["inputs"]["start.reward"] != "absent"
    assert "start" in json.loads((two_rounds / "5-ppo" / "manifest.json").read_text())["inputs"]  # rejection's policy
    new = tiny_runs.rows(two_rounds / "round-2" / "3-label" / "comparisons.jsonl")
    old = {one["id"] for one in tiny_runs.rows(two_rounds / "3-label" / "comparisons.jsonl")}
    assert all(one["provenance"]["round"] == 2 for one in new)
    assert not {one["id"] for one in new} & old
    kept = two_rounds / second["kept"]["adapter"]
    assert tiny_runs.contents(two_rounds / "policy") == tiny_runs.contents(kept)


@pytest.mark.slow
def test_a_run_cut_off_in_and_between_rounds_and_continued_equals_one_that_was_not(
    two_rounds, tmp_path, tiny_model, monkeypatch
):
    from rlaif.stages import rejection

    recipe = loaded(tmp_path, tiny_model, output=str(tmp_path / "run"), **SMALL)

    def cut(place, name, stop):
        """Run until a function is called in the second round or, of the gate, in the first."""
        whole = getattr(place, name)

        def called(run, *args, **options):
            result = whole(run, *args, **options) if stop == "after" else None
            if run.round == (1 if name == "decide" else 2):
                raise tiny_runs.Stopped
            return result if stop == "after" else whole(run, *args, **options)

        with monkeypatch.context() as patch, pytest.raises(tiny_runs.Stopped):
            patch.setattr(place, name, called)
            run_recipe(recipe, Progress(quiet=True))

    cut(gate, "decide", "before")
    cut(gate, "decide", "after")
    cut(candidates, "origin_of_round", "before")
    cut(reward, "measure", "before")
    cut(rejection, "_write_responses", "after")
    cut(ppo, "save", "after")
    cut(evaluate, "respond_as", "after")
    said = said_by(recipe)
    assert said[:8] == [f"{name}: up to date" for name in (*FOLDERS_OF_ROUND_1, "round-2/3-label")]
    theirs, ours = everything(tmp_path / "run"), everything(two_rounds)
    assert theirs.keys() == ours.keys()
    assert [name for name in ours if theirs[name] != ours[name]] == []


@pytest.mark.slow
def test_report_trace_chat_and_plan_know_the_rounds(two_rounds, tmp_path):
    page = write_report(two_rounds).read_text(encoding="utf-8")
    assert '<h3 id="rounds">Rounds</h3>' in page and "What follows is of round 2" in page
    answers = tiny_runs.rows(two_rounds / "round-2" / "6-evaluate" / "responses.jsonl")
    shown = ["\n".join(tree.as_lines(one)) for one in ([node] for node in trace.trace(two_rounds, answers[-1]["id"]))]
    assert "round-2/4-reward/adapter" in shown[-1] and "round-2/8-rejection/policy" in shown[-1]
    assert "not in the journal" not in shown[-1]
    assert Conversation(two_rounds, max_new_tokens=2, temperature=0.0).title == "kept after round 2"
    copy = shutil.copytree(two_rounds, tmp_path / "copy")
    again = plan(load_recipe(copy / "recipe.yaml", [f"output={copy}"]), first="round-2/ppo")
    assert [str(Step(one.round, one.stage)) for one in again if one.reasons] == ["round-2/ppo", "round-2/evaluate"]
    done = CliRunner().invoke(app, ["ppo", str(two_rounds / "recipe.yaml"), "--round", "2"])
    assert done.exit_code == 0 and "round-2/5-ppo: up to date" in done.output
    done = CliRunner().invoke(app, ["ppo", str(two_rounds / "recipe.yaml"), "--round", "3"])
    assert "has no stage `round-3/ppo`" in str(done.exception)


@pytest.mark.slow
def test_a_further_round_runs_alone_and_asks_nothing_again(tmp_path, tiny_model):
    folder = tiny_runs.whole_run(tmp_path / "run", tiny_model, **BARE)
    before = tiny_runs.lasting(folder)
    more = loaded(tmp_path, tiny_model, output=str(folder), **{**BARE, "rounds": {"count": 3, "gate": "score"}})
    assert said_by(more) == [
        *("5-ppo: up to date", "6-evaluate: up to date", "round-2/5-ppo: up to date", "round-2/6-evaluate: up to date"),
        *("round-3/5-ppo", "round-3/6-evaluate"),
    ]
    after = tiny_runs.lasting(folder)
    assert [name for name in before if not name.startswith("policy/") and before[name] != after[name]] == []
    fewer = loaded(tmp_path, tiny_model, output=str(folder), **BARE)
    assert all(line.endswith("up to date") for line in said_by(fewer))
    assert len(said_by(fewer)) == 4


@pytest.mark.slow
def test_pairs_of_a_later_round_wait_for_people_and_go_on_with_their_labels(tmp_path, tiny_model):
    shown = {"prompt": "Hello?", "chosen": "Hello.", "rejected": "Go away.", "tag": "ordinary"}
    (tmp_path / "people.jsonl").write_text(json.dumps(shown) + "\n")
    changes = BARE | {"stages": ["label", "ppo", "evaluate"], "feedback": "human"}
    changes |= {"human": {"files": ["people.jsonl"]}, "rounds": {"count": 2, "gate": "score", "human_pairs": 3}}
    recipe = loaded(tmp_path, tiny_model, output=str(tmp_path / "run"), **changes)
    with pytest.raises(StageError, match="round 2: 3 pairs of answers of the newest policy wait for people's labels"):
        run_recipe(recipe, Progress(quiet=True))
    later = tmp_path / "run" / "round-2"
    pairs = tiny_runs.rows(later / "pairs.jsonl")
    labelled = [one | {"better_response_id": index % 2} for index, one in enumerate(pairs[:2])]
    strange = labelled[0] | {"id": "strange", "prompt": "Another prompt?"}
    (later / "labels.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*labelled, strange]))
    assert said_by(recipe)[:4] == [
        "3-label: up to date",
        "5-ppo: up to date",
        "6-evaluate: up to date",
        "round-2/3-label",
    ]
    rows = tiny_runs.rows(later / "3-label" / "comparisons.jsonl")
    assert [one["chosen"][0]["content"] for one in rows] == [
        pairs[0]["response_0"].strip(),
        pairs[1]["response_1"].strip(),
    ]
    assert [one["provenance"]["round"] for one in rows] == [2, 2]
    reasons = [one["reason"] for one in tiny_runs.rows(later / "3-label" / "unused.jsonl")]
    assert {"no label by people", "no pair of this round"} <= set(reasons)
