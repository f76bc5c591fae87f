"""PPO that warns, stops and goes on; numbers that are none; a score not optimized; metrics that are explained."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_ppo
import tiny_runs
import torch
from safetensors.torch import load_file, save_file
from test_docs import PAGES, rows, ticked
from tiny_ppo import cut_off, metrics, results

from rlaif import health
from rlaif.errors import ModelError, StageError
from rlaif.model.adapters import refuse_other_tokenizer
from rlaif.records import Prompt
from rlaif.stages import ppo
from rlaif.stages.training import STARTED
from rlaif.stages.watching import refuse_gradient, refuse_not_finite

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")
functions, opened = tiny_ppo.functions, tiny_ppo.opened
LETTERS = {"reward_function": "small_letters", "num_ppo_epochs": 1}


@pytest.fixture
def rules(monkeypatch, functions):
    """Let parts of a score, and a constraint, name the functions of tiny_ppo."""
    for module in ("composite", "constraint"):
        monkeypatch.setattr(f"rlaif.stages.{module}.find_function", lambda name, key: getattr(tiny_ppo, name))


# --- numbers that are none -------------------------------------------------------------------------------------------


def test_a_number_that_is_not_finite_is_named_with_its_response():
    asked = [Prompt(id=f"p{n}", prompt="Hello?") for n in range(3)]
    fine = torch.zeros(3, 2)
    refuse_not_finite(0, asked, score=fine[:, 0], logprobs=fine)
    bad = fine.clone()
    bad[1, 1] = -torch.inf
    with pytest.raises(StageError, match=r"update 5: logprobs of response 2 \(to `p1`\) hold -inf; finite"):
        refuse_not_finite(4, asked, score=fine[:, 0], logprobs=bad)
    with pytest.raises(StageError, match=r"update 1: score of response 2 \(to `p1`\) is -inf; finite"):
        refuse_not_finite(0, asked, score=bad[:, 1], logprobs=fine)
    refuse_gradient(0, "policy/gradient_norm", 3.0)
    with pytest.raises(StageError, match=r"update 1: policy/gradient_norm is nan; .* Lower ppo.learning_rate"):
        refuse_gradient(0, "policy/gradient_norm", float("nan"))


@pytest.mark.slow
def test_a_reward_model_that_overflows_stops_ppo_before_a_step_and_with_the_prompt(opened):
    run = opened()
    path = run.stage_folder("reward") / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.score.weight"] *= 3e38  # infinity minus infinity, summed over hidden states
    save_file(tensors, path)
    with pytest.raises(StageError, match=r"gives response \d \(to `[a-z]+-\d+`\) the score (nan|-?inf); \d of 4"):
        ppo.ppo(run)
    assert metrics(run) == []


@pytest.mark.slow
def test_a_gradient_of_nan_stops_ppo_with_the_last_checkpoint_kept(opened, functions, monkeypatch):
    run = opened(**LETTERS)
    clip = torch.nn.utils.clip_grad_norm_
    seen = []

    def clipped(parameters, limit):
        seen.append(clip(parameters, limit))
        return seen[-1] * (torch.nan if len(seen) == 4 else 1)  # of the critic, in the second update

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    with pytest.raises(StageError, match="update 2: value/gradient_norm is nan"):
        ppo.ppo(run)
    assert [path.name for path in (run.stage_folder("ppo") / "checkpoints").iterdir()] == ["checkpoint-1"]


# --- warnings and stops ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_constant_score_stops_after_the_first_update_and_goes_on_where_the_recipe_says_so(opened, functions):
    keys = {"reward_function": "ones", "updates": 2, "num_ppo_epochs": 1, "save_every_updates": 2}
    stopped = opened("run", **keys, health={})
    with pytest.raises(StageError, match=r"update 1: rollout/score_std is 0; .* nothing to learn") as caught:
        ppo.ppo(stopped)
    assert "ppo.health.stop lists `constant_score`" in str(caught.value)
    with pytest.raises(StageError, match="nothing to learn"):  # at once: no update is made
        ppo.ppo(stopped)
    assert [row["update"] for row in metrics(stopped)] == [1]
    goes_on = opened("run", **keys, health={"stop": []})
    assert ppo.inputs(goes_on) == ppo.inputs(stopped)
    counts = ppo.ppo(goes_on)
    assert counts["warnings"] == {"constant_score": 1}
    whole = opened("whole", **keys, health={"stop": []})
    assert ppo.ppo(whole) == counts
    assert results(goes_on) == results(whole)


@pytest.mark.slow
def test_a_warning_is_said_once_also_by_a_run_that_is_resumed(opened, functions, monkeypatch):
    limits = {"window": 1, "kl_to_old": 1e-12, "entropy": None}
    run = opened(**LETTERS | {"num_ppo_epochs": 2}, health=limits)
    said = []
    monkeypatch.setattr(run.progress, "say", said.append)
    cut_off(run, monkeypatch, "record", update=2)
    counts = ppo.ppo(run)
    warned = [line for line in said if "(ppo.health.kl_to_old)" in line]
    assert len(warned) == 1
    assert warned[0].startswith("  warning: update 1: policy/kl_to_old is")
    assert "at most 1e-12 nats a token is expected over 1 updates. Steps are too large: lower" in warned[0]
    assert counts["warnings"]["kl_to_old"] == 1


def test_limits_are_no_input_of_the_stage_and_an_independent_score_is(opened, functions):
    plain = ppo.inputs(opened("a", reward_function="ones"))
    assert ppo.inputs(opened("b", reward_function="ones", health={"kl_to_reference": 3.0})) == plain
    watched = ppo.inputs(opened("c", reward_function="ones", independent=[{"name": "r", "function": "brief"}]))
    assert watched.items() > plain.items()
    assert watched.keys() - plain.keys() == {"independent"}


# --- an independent score --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_independent_score_changes_nothing_that_is_learned_and_is_resumed_on_its_scale(opened, rules, monkeypatch):
    parts = [{"name": "few", "function": "few_small_letters", "weight": 3.0}]
    whole = opened("whole", **LETTERS, independent=parts)
    ppo.ppo(whole)
    for row in metrics(whole):  # the opposite of what is optimized, on the scale of the first rollout
        assert row[health.INDEPENDENT] == pytest.approx(-row["rollout/score"], abs=1e-5)
        assert row[health.INDEPENDENT_SPREAD] == pytest.approx(row["rollout/score_std"], abs=1e-5)
    plain = opened("plain", **LETTERS)
    ppo.ppo(plain)
    own = {health.INDEPENDENT, health.INDEPENDENT_SPREAD}
    assert metrics(plain) == [{key: row[key] for key in row if key not in own} for row in metrics(whole)]
    assert tiny_runs.contents(plain.stage_folder("ppo") / "policy", "*.safetensors") == tiny_runs.contents(
        whole.stage_folder("ppo") / "policy", "*.safetensors"
    )
    resumed = opened("resumed", **LETTERS, independent=parts)
    cut_off(resumed, monkeypatch, "record", update=1)
    ppo.ppo(resumed)
    assert results(resumed) == results(whole)


@pytest.mark.slow
def test_ppo_writes_every_metric_that_its_page_explains_and_no_other(opened, rules):
    """One run with all that adds metrics, but for a server (`test_rollouts.py`): critics, the KL in the loss, ..."""
    Path("text.txt").write_text("Some plain text. " * 4)
    run = opened(
        rewards=[{"name": "NAME", "function": "small_letters"}],
        independent=[{"name": "few", "function": "few_small_letters"}],
        kl_in="loss",
        ptx_coef=0.1,
        ptx_file=str(Path("text.txt").resolve()),
        ptx_length=16,
        ptx_batch=1,
        constraint={"function": "few_small_letters"},
        final_temperature=0.9,
        final_entropy_coef=0.01,
        reference_share=0.5,
        rollout_batch=8,
        minibatch=8,
        microbatch=4,
        updates=2,
    )
    ppo.ppo(run)
    table = rows(PAGES["ppo.md"], "## Metrics")[1:]
    here = {key for cells in table if "with `sampling_engine`" not in cells[1] for key in ticked(cells[0])}
    assert set().union(*metrics(run)) == here


# --- what does not belong here ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_of_another_recipe_is_refused_and_one_of_this_run_is_continued(opened, functions, monkeypatch):
    runs = [opened(name, **LETTERS, learning_rate=rate) for name, rate in (("own", 1e-4), ("other", 1e-3))]
    for run in runs:  # as the pipeline does before it calls the stage
        run.stage_folder("ppo").mkdir(parents=True, exist_ok=True)
        (run.stage_folder("ppo") / STARTED).write_text(json.dumps(ppo.inputs(run)["recipe.ppo"]))
        cut_off(run, monkeypatch, "record", update=1)
    own, other = (run.stage_folder("ppo") / "checkpoints" for run in runs)
    shutil.copytree(other / "checkpoint-1", own / "checkpoint-7")
    with pytest.raises(
        StageError, match=r"checkpoint-7: written under other inputs than this stage's: by another recipe"
    ):
        ppo.ppo(runs[0])
    assert (own / "checkpoint-7").is_dir()
    shutil.rmtree(own / "checkpoint-7")
    said = []
    monkeypatch.setattr(runs[0].progress, "say", said.append)
    ppo.ppo(runs[0])
    assert said[0] == "  continuing after step 1"


class Vocabulary(dict):
    """Stands for a tokenizer."""

    def get_vocab(self):
        return dict(self)


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_an_adapter_of_another_tokenizer_is_refused_with_the_first_token_that_differs(tmp_path, kind):
    tokens = ["<pad>", "a", "b", "c"]
    vocab = {token: at for at, token in enumerate(tokens)} if kind == "BPE" else [[token, -1.0] for token in tokens]
    stored = {"model": {"type": kind, "vocab": vocab}, "added_tokens": [{"content": "<end>", "id": 9}]}
    refuse_other_tokenizer(tmp_path, Vocabulary(a=7))  # a folder without a tokenizer tells nothing
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    refuse_other_tokenizer(tmp_path, Vocabulary({"<pad>": 0, "a": 1, "b": 2, "c": 3, "<end>": 9, "new": 10}))
    with pytest.raises(
        ModelError, match=r"another tokenizer: `a` is token 1 there and 2 here; 2 of 4 shared tokens have"
    ):
        refuse_other_tokenizer(tmp_path, Vocabulary({"<pad>": 0, "a": 2, "b": 1, "<end>": 9}))
    with pytest.raises(ModelError, match="another tokenizer: 0 of 0 shared tokens"):
        refuse_other_tokenizer(tmp_path, Vocabulary(z=0))
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ModelError, match="not a tokenizer's file"):
        refuse_other_tokenizer(tmp_path, Vocabulary(a=1))
