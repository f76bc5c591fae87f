"""Rewards put together from parts: what each says, how they combine, what is logged, and what resuming keeps."""

import json
import math

import pytest
import tiny_runs
import torch

from rlaif.errors import DataError, StageError
from rlaif.model import sampling
from rlaif.model.sampling import Batch
from rlaif.records import Prompt
from rlaif.report.curves import ppo_figures
from rlaif.stages import actors, ppo
from rlaif.stages import composite as module
from rlaif.stages.composite import Composite, cost_stage, repeated_share
from rlaif.stages.scorers import scorers_of

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")
FLOAT32 = 1e-5  # a few float32 sums of numbers near 1
TEXTS = ["aaaa", "AA", "a", "aaaAAAA"]
FUNCTIONS = {
    "letters": lambda prompts, completions, **columns: [float(sum(map(str.islower, text))) for text in completions],
    "capitals": lambda prompts, completions, **columns: [float(sum(map(str.isupper, text))) for text in completions],
    "some": lambda prompts, completions, **columns: [float(len(t)) if "a" in t else None for t in completions],
    "none": lambda prompts, completions, **columns: [None] * len(completions),
}


@pytest.fixture
def functions(monkeypatch):
    known = dict(FUNCTIONS)
    monkeypatch.setattr(module, "find_function", lambda name, key: known[name])
    return known


@pytest.fixture
def opened(tmp_path, tiny_model):
    """Open a run whose stages before `ppo` left adapters of random weights: ``opened("name", rewards=[...], ...)``."""
    stack = []

    def open_run(folder="run", *, sections=None, **settings):
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        needs = {key for part in settings["rewards"] for key in part} & {"model", "cost"}
        changes = {"ppo": settings, "reward": {"cost": "cost" in needs}} | (sections or {})
        context = tiny_runs.opened(place, tiny_model, **changes, **({} if needs else {"stages": ["ppo"]}))
        run = context.__enter__()
        stack.append(context)
        if needs and not run.stage_folder("sft").exists():
            tiny_runs.with_sft(run)
            with_adapter(run, "reward", run.stage_folder("reward"))
            with_adapter(run, "cost", run.stage_folder("reward") / "cost")
        return run

    yield open_run
    for context in reversed(stack):
        context.__exit__(None, None, None)


def with_adapter(run, role, folder):
    tiny_runs.save_random_role(run, role, folder / "adapter", seed=len(role), head=True, size=0.2)
    share = {"n": 20, "count": 18, "rate": 0.9, "low": 0.5, "high": 1.0}
    measured = {"heldout": {"all": share}, "offset": 0.0, "scale": 1.0, "members": [{"offset": 0.0, "scale": 1.0}]}
    (folder / "calibration.json").write_text(json.dumps(measured))


def metrics(run):
    return tiny_runs.rows(run.stage_folder("ppo") / "metrics.jsonl")


def samples(run):
    return tiny_runs.rows(run.stage_folder("ppo") / "samples.jsonl")


def made_up(lengths=(4, 2, 1, 7), tags=("t", "t", "t", "t")):
    """Prompts, and a batch in which only the responses' ids and lengths mean anything."""
    width = max(lengths)
    ids = torch.arange(len(lengths) * width).reshape(len(lengths), width) % 5
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    rows = [Prompt(id=f"p{index}", prompt="P", tag=tag) for index, tag in enumerate(tags)]
    return rows, Batch(ids, mask, ids, ids, mask)


def scored(run, texts=TEXTS, tags=("t", "t", "t", "t"), parts=None):
    rows, batch = made_up(tags=tags)
    return (parts or Composite(run, None, None, "ppo")).score(rows, texts, batch)


def z(values):
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return [(value - mean) / spread for value in values]


LETTERS, CAPITALS = {"name": "letters", "function": "letters"}, {"name": "capitals", "function": "capitals"}
LONG, REPEATS = {"name": "long", "length": 2, "weight": 0.5}, {"name": "repeats", "repetition": 1, "weight": 3.0}
GATE = {"combine": "gate", "gate_safety": "safe", "gate_helpfulness": "helpful"}
GATED = [{"name": "safe", "function": "safe"}, {"name": "helpful", "function": "helpful"}]


# --- how parts combine -----------------------------------------------------------------------------------------------


def test_a_sum_weighs_parts_in_deviations_of_the_first_rollout_and_takes_penalties_off(opened, functions):
    found = scored(opened(rewards=[LETTERS | {"weight": 2.0}, CAPITALS, LONG, REPEATS]))
    letters, capitals = z([4, 0, 1, 3]), z([0, 2, 0, 4])
    too_long, repeated = [2, 0, 0, 5], [0, 0, 0, 2 / 7]  # ids count modulo 5: the last response repeats two of seven
    expected = [2 * a + b - 0.5 * c - 3 * d for a, b, c, d in zip(letters, capitals, too_long, repeated, strict=True)]
    assert found.total.tolist() == pytest.approx(expected, abs=FLOAT32)
    assert found.parts["letters"].tolist() == pytest.approx(letters, abs=FLOAT32)
    assert found.parts["long"].tolist() == too_long
    assert found.parts["repeats"].tolist() == pytest.approx(repeated, abs=FLOAT32)


def test_the_worst_of_the_parts_counts_and_penalties_are_taken_off_it(opened, functions):
    found = scored(opened(rewards=[LETTERS, CAPITALS, LONG], combine="worst"))
    expected = [min(a, b) - 0.5 * c for a, b, c in zip(z([4, 0, 1, 3]), z([0, 2, 0, 4]), [2, 0, 0, 5], strict=True)]
    assert found.total.tolist() == pytest.approx(expected, abs=FLOAT32)


def test_later_rollouts_are_measured_by_the_first(opened, functions):
    run = opened(rewards=[LETTERS])
    parts = Composite(run, None, None, "ppo")
    scored(run, parts=parts)
    mean, spread = 2.0, math.sqrt(2.5)
    later = scored(run, ["a", "aa", "aaa", "aaaaaa"], parts=parts)
    assert later.total.tolist() == pytest.approx([(n - mean) / spread for n in (1, 2, 3, 6)], abs=FLOAT32)


def test_the_gate_jumps_between_the_two_scores_of_llama_2(opened, functions):
    # sigmoid(safety) .10, .20, .20 and .10, helpfulness .90 and .05; the threshold is .15
    functions["safe"] = lambda prompts, completions, **columns: [math.log(p / (1 - p)) for p in (0.1, 0.2, 0.2, 0.1)]
    functions["helpful"] = lambda prompts, completions, **columns: [
        math.log(p / (1 - p)) for p in (0.9, 0.9, 0.05, 0.9)
    ]
    found = scored(opened(rewards=GATED, **GATE))
    assert found.total.tolist() == pytest.approx([-2.19722, 2.19722, -2.94444, -2.19722], abs=FLOAT32)
    tagged = scored(opened("tags", rewards=GATED, gate_tags=["harmful"], **GATE), tags=("t", "harmful", "t", "t"))
    assert tagged.total.tolist() == pytest.approx([-2.19722, -1.38629, -2.94444, -2.19722], abs=FLOAT32)
    open_gate = scored(opened("open", rewards=GATED, gate_threshold=0.05, **GATE))
    assert open_gate.total.tolist() == pytest.approx([2.19722, 2.19722, -2.94444, 2.19722], abs=FLOAT32)


@pytest.mark.parametrize("combine", ["sum", "worst"])
def test_a_better_part_never_makes_the_reward_worse_nor_a_longer_response_better(opened, functions, combine):
    run = opened(rewards=[LETTERS, CAPITALS, LONG, REPEATS], combine=combine)
    parts = Composite(run, None, None, "ppo")
    before = scored(run, parts=parts).total
    for name in ("letters", "capitals"):
        better = Composite(run, None, None, "ppo")
        better.standards = parts.standards
        better._functions[name] = lambda name=name, **given: [x + 1 for x in FUNCTIONS[name](**given)]
        after = scored(run, parts=better).total
        assert (after >= before).all() and (after > before).any()
    rows, _ = made_up()
    longer = parts.score(rows, TEXTS, made_up((5, 3, 3, 8))[1]).total
    assert (longer < before).all()


def test_a_mean_of_no_score_and_a_deviation_of_one_are_left_out():
    assert module.score_figures("mean", "spread", torch.zeros(0)) == {}
    assert module.score_figures("mean", "spread", torch.tensor([2.0])) == {"mean": 2.0}
    assert module.score_figures("mean", "spread", torch.tensor([2.0, 5.0])) == {"mean": 3.5, "spread": 1.5}
    nowhere = {"some": torch.tensor([torch.nan, 3.0]), "none": torch.tensor([torch.nan, torch.nan])}
    assert module.part_figures(nowhere) == {"rollout/score/some": 3.0}


def test_a_part_that_says_none_of_a_response_does_not_apply_to_it(opened, functions):
    some = {"name": "some", "function": "some"}
    found = scored(opened(rewards=[LETTERS, some]))  # `some` gives 4, None, 1 and 7: mean 4, deviation sqrt(6)
    own = [0, math.nan, -3 / math.sqrt(6), 3 / math.sqrt(6)]
    assert found.parts["some"].tolist() == pytest.approx(own, abs=FLOAT32, nan_ok=True)
    expected = [a + (0 if math.isnan(b) else b) for a, b in zip(z([4, 0, 1, 3]), own, strict=True)]
    assert found.total.tolist() == pytest.approx(expected, abs=FLOAT32)
    assert module.part_scores(found.parts, 1)["some"] is None
    assert module.part_figures(found.parts)["rollout/score_std/some"] == pytest.approx(1, abs=FLOAT32)
    worst = scored(opened("worst", rewards=[LETTERS, some], combine="worst"))
    assert worst.total[1].item() == pytest.approx(z([4, 0, 1, 3])[1], abs=FLOAT32)


@pytest.mark.parametrize(
    ("names", "settings", "complaint"),
    [
        (["some"], {}, "no part that scores applies to a response to `p1`"),
        (["letters", "none"], {}, "the part `none` applies to none of the first 4 responses"),
        (
            ["letters", "some"],
            {"combine": "gate", "gate_safety": "some", "gate_helpfulness": "letters"},
            "score 1 .*is None",
        ),
    ],
)
def test_responses_without_a_number_stop_ppo(opened, functions, names, settings, complaint):
    run = opened(rewards=[{"name": name, "function": name} for name in names], **settings)
    with pytest.raises(DataError, match=complaint):
        scored(run)


@pytest.mark.parametrize(
    ("ids", "n", "share"),
    [
        ([5, 6, 5, 6, 5], 2, 0.5),
        ([1, 2, 3], 1, 0),
        ([4, 4, 4, 4], 1, 0.75),
        ([4, 4, 4, 4], 3, 0.5),
        ([1], 2, 0),
        ([], 1, 0),
    ],
)
def test_repetition_is_the_share_of_n_grams_that_stood_there_before(ids, n, share):
    assert repeated_share(ids, n) == share


# --- in PPO ----------------------------------------------------------------------------------------------------------

ALL = [
    {"name": "quality", "model": True},
    {"name": "harm", "cost": "reward", "weight": 0.5},
    LETTERS | {"weight": 2.0},
    {"name": "rating", "judge": True},
    LONG,
    REPEATS,
]
ASKS = {"label": {"min_option_mass": 0.0}}  # the tiny model puts nearly nothing on the numbers


def test_every_part_is_logged_and_the_total_is_made_of_them(opened, functions):
    run = opened(rewards=ALL, updates=2, sections=ASKS)
    ppo.ppo(run)
    first, second = metrics(run)
    for name in ("quality", "harm", "letters", "rating"):
        assert first[f"rollout/score/{name}"] == pytest.approx(0, abs=FLOAT32)
        assert first[f"rollout/score_std/{name}"] == pytest.approx(1, abs=FLOAT32)
        assert second[f"rollout/score/{name}"] != first[f"rollout/score/{name}"]
    assert 0 <= first["rollout/score/long"] <= 6 and first["rollout/score/repeats"] >= 0
    assert (first["rollout/score"], first["rollout/score_std"]) == (
        pytest.approx(0, abs=1e-5),
        pytest.approx(1, abs=1e-5),
    )
    scale = json.loads((run.stage_folder("ppo") / "scale.json").read_text())
    assert sorted(scale["parts"]) == ["harm", "letters", "quality", "rating"]
    for row in samples(run):
        part = row["parts"]
        total = part["quality"] + 0.5 * part["harm"] + 2 * part["letters"] + part["rating"]
        total -= 0.5 * part["long"] + 3 * part["repeats"]
        assert row["score"] == pytest.approx((total - scale["offset"]) / scale["scale"], abs=1e-4)


def test_the_report_draws_the_parts_in_one_chart_after_the_score():
    rows = [{"update": n, "rollout/score": 0.1 * n} for n in (1, 2)]
    parts = [row | {"rollout/score/one": row["update"], "rollout/score_std/one": 1.0} for row in rows]
    parts[1]["rollout/score/two"] = 3.0
    plain, figures = ppo_figures(rows), ppo_figures(parts)
    assert [figure.title for figure in figures] == ["Score", "Parts of the reward", *(one.title for one in plain[1:])]
    assert not {"Value loss", "Explained variance", "Loss on plain text"} & {figure.title for figure in plain}
    critic = ppo_figures([{**rows[0], "value/loss": 0.5, "ptx/loss": 2.0}])
    assert {"Value loss", "Loss on plain text"} < {figure.title for figure in critic}
    assert all(name in figures[1].chart for name in (">one<", ">two<"))
    assert "score_std" not in figures[1].chart


def test_a_cost_counts_negatively(opened):
    run = opened(rewards=[{"name": "harm", "cost": "reward"}])
    base = run.load_base()
    parts = Composite(run, base, None, "ppo")
    batch = sampling.pack(base, [[5, 6], [7], [8], [9, 9]], [[10, 11, 2], [12, 2], [13, 14, 2], [15, 2]])
    with base.acting_as("cost"), torch.no_grad():
        costs = sampling.scores(base, "cost", batch).flatten().tolist()
    total = parts.score(made_up()[0], TEXTS, batch).total
    assert total.tolist() == pytest.approx([-value for value in z(costs)], abs=1e-4)


@pytest.mark.slow
def test_the_order_in_which_parts_are_listed_changes_nothing(opened, functions):
    one, other = (
        opened(f"run-{n}", rewards=parts, updates=2)
        for n, parts in enumerate((ALL[2:3] + ALL[4:], ALL[5:3:-1] + ALL[2:3]))
    )
    assert ppo.inputs(one) == ppo.inputs(other)
    for run in (one, other):
        ppo.ppo(run)
    assert metrics(one) == metrics(other)
    assert samples(one) == samples(other)


# The first four responses have letters where they have no capitals, and so equal sums.
GO_ON = {"stop": []}


@pytest.mark.slow
def test_a_run_cut_off_and_resumed_keeps_the_scales_of_the_first_rollout(opened, functions, monkeypatch):
    whole, resumed = (
        opened(name, rewards=[LETTERS, CAPITALS, LONG], health=GO_ON, updates=2) for name in ("whole", "resumed")
    )
    ppo.ppo(whole)
    score = ppo.score

    def stop_in_the_second_update(actors, *rest):
        if metrics_path.exists() and len(metrics(resumed)) == 1:
            raise tiny_runs.Stopped
        return score(actors, *rest)

    metrics_path = resumed.stage_folder("ppo") / "metrics.jsonl"
    with monkeypatch.context() as patch, pytest.raises(tiny_runs.Stopped):
        patch.setattr(ppo, "score", stop_in_the_second_update)
        ppo.ppo(resumed)
    ppo.ppo(resumed)
    assert len(metrics(whole)) == 2
    assert metrics(resumed) == metrics(whole)
    assert samples(resumed) == samples(whole)
    scales = [json.loads((run.stage_folder("ppo") / "scale.json").read_text()) for run in (whole, resumed)]
    assert scales[0] == scales[1]


def test_evaluation_scores_on_the_scale_of_ppo(opened, functions):
    run = opened(rewards=[LETTERS, CAPITALS], health=GO_ON, updates=2)
    ppo.ppo(run)
    rows = samples(run)[4:]
    prompts, batch = made_up()
    values = scorers_of(run, run.load_base())["score"](prompts, [row["response"] for row in rows], batch)
    assert values.tolist() == pytest.approx([row["score"] for row in rows], abs=1e-4)


def test_a_reward_depends_on_its_parts_and_on_the_cost_adapter(opened, functions):
    plain = opened("plain", rewards=[LETTERS])
    assert "cost" not in ppo.inputs(plain)
    assert ppo.inputs(plain) != ppo.inputs(opened("heavy", rewards=[LETTERS | {"weight": 2.0}]))
    run = opened("cost", rewards=[{"name": "harm", "cost": "reward"}])
    before = ppo.inputs(run)["cost"]
    (run.stage_folder("reward") / "cost" / "adapter" / "adapter_config.json").write_text("{}")
    assert ppo.inputs(run)["cost"] not in (before, "absent")


# --- the cost adapter ------------------------------------------------------------------------------------------------


def test_the_cost_adapter_is_this_runs_or_that_of_the_folder_named(opened):
    run = opened("own", rewards=[{"name": "harm", "cost": "reward"}])
    own = run.stage_folder("reward")
    assert cost_stage(run) == own
    other = opened("other", rewards=[{"name": "harm", "cost": str(own)}])
    assert cost_stage(other) == own
    assert ppo.inputs(other)["cost"] == ppo.inputs(run)["cost"]


def test_without_a_trained_cost_adapter_ppo_says_to_train_one(opened):
    run = opened(rewards=[{"name": "harm", "cost": "reward"}])
    (run.stage_folder("reward") / "cost").rename(run.stage_folder("reward") / "moved")
    with pytest.raises(
        StageError, match=r"4-reward/cost: holds no trained reward model .* run the stage `reward` first"
    ):
        ppo.ppo(run)


def rate(count):
    return {"n": 20, "count": count, "rate": count / 20, "low": 0.0, "high": 1.0}


@pytest.mark.parametrize(
    ("measured", "complaint"),
    [
        ({"sign_of_unsafe": rate(20), "sign_of_safe": rate(2)}, "signs: right of 20 of 20 unsafe and of 2 of 20 safe"),
        ({"order": rate(11)}, "the more harmful of two answers: 11 of 20 pairs right"),
        ({"sign_of_unsafe": rate(20), "sign_of_safe": None}, "nothing: no held-out answers of both signs"),
        ({"sign_of_unsafe": rate(20), "sign_of_safe": rate(4), "order": rate(12)}, None),
        ({"order": rate(12)}, None),
    ],
)
def test_a_cost_that_cannot_tell_harm_stops_ppo_unless_it_is_allowed(opened, monkeypatch, measured, complaint):
    for allowed in (False, True):
        own = {"reward": {"cost": True, "allow_weak_reward": allowed, "min_heldout_accuracy": 0.6}}
        run = opened(rewards=[{"name": "harm", "cost": "reward"}], sections=own)
        said = []
        monkeypatch.setattr(run.progress, "say", said.append)
        if complaint and not allowed:
            with pytest.raises(StageError, match=f"^ppo: the cost model is below .* 60% on {complaint}.*reward: true"):
                actors.refuse_weak_cost(run, measured)
        else:
            actors.refuse_weak_cost(run, measured)
        assert [complaint in line for line in said] == ([True] if complaint and allowed else [])


def test_ppo_reads_what_the_cost_was_worth_before_it_loads_a_model(opened, monkeypatch):
    own = {"reward": {"cost": True, "allow_weak_reward": False}}
    run = opened(rewards=[{"name": "harm", "cost": "reward"}], sections=own)
    place = run.stage_folder("reward") / "cost" / "calibration.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"order": rate(10)}))
    monkeypatch.setattr(run, "load_base", lambda: pytest.fail("it is too weak"))
    with pytest.raises(StageError, match="the cost model is below"):
        ppo.ppo(run)
