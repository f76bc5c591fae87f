"""Plain text beside PPO: how it is cut and drawn, what its gradient is, and what it keeps from being forgotten."""

import json
import math

import pytest
import tiny_ppo
import tiny_runs
import torch
from tiny_ppo import Stopped, cut_off, metrics, results

from rlaif.errors import DataError
from rlaif.stages import ppo
from rlaif.stages.actors import POLICY, assign_roles
from rlaif.stages.ptx import Ptx, cut, read_texts, summed_loss

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")
functions, opened = tiny_ppo.functions, tiny_ppo.opened
TEXT = "The cat sat on the mat, and the dog lay at the door. " * 6
LEARNS = {"ptx_coef": 0.5, "ptx_file": "plain.txt", "ptx_length": 32, "ptx_batch": 3, "ptx_heldout": 2}


@pytest.fixture
def text(tmp_path):
    """The file stands in the working folder of the test."""
    (tmp_path / "plain.txt").write_text(TEXT)


def nll(base, chunks):
    """Mean over tokens after the first of each chunk, one row at a time and without padding."""
    total, count = 0.0, 0
    for chunk in chunks:
        ids = torch.tensor([chunk])
        with torch.no_grad(), base.acting_as(POLICY):
            logprobs = base.logits(base.trunk(input_ids=ids, use_cache=False).last_hidden_state).log_softmax(-1)
        total -= sum(logprobs[0, place, token].item() for place, token in enumerate(chunk[1:]))
        count += len(chunk) - 1
    return total / count


# --- the text --------------------------------------------------------------------------------------------------------


def test_a_document_is_cut_into_chunks_that_hold_it_whole(opened, functions, text):
    actors = assign_roles(opened(reward_function="ones"))
    chunks = cut(actors.base, TEXT, 32)
    assert [len(chunk) for chunk in chunks] == [32] * (len(TEXT) // 32) + [len(TEXT) % 32]  # the tiny model's bytes
    assert actors.base.tokenizer.raw.decode([token for chunk in chunks for token in chunk]) == TEXT
    assert cut(actors.base, "x", 32) == [] and cut(actors.base, "", 32) == []
    assert cut(actors.base, "abc", 2) == cut(
        actors.base, "ab", 2
    )  # of a last chunk of one token nothing can be learned


def test_a_control_token_in_the_text_is_text(opened, functions):
    actors = assign_roles(opened(reward_function="ones"))
    (chunk,) = cut(actors.base, "a<|end|>b", 32)
    assert len(chunk) == len("a<|end|>b") and not set(chunk) & set(actors.base.tokenizer.eos_ids)


def test_chunks_begin_as_the_tokenizer_begins_a_text(opened, functions, monkeypatch):
    actors = assign_roles(opened(reward_function="ones"))
    tokenizer = actors.base.tokenizer
    plain = type(tokenizer.raw).__call__
    begins = lambda self, text, **options: {"input_ids": [1]} if text == "" else plain(self, text, **options)  # noqa: E731
    monkeypatch.setattr(type(tokenizer.raw), "__call__", begins)
    assert [(chunk[0], len(chunk)) for chunk in cut(actors.base, "abcdefg", 4)] == [(1, 4), (1, 4), (1, 2)]


def test_json_lines_hold_a_document_a_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "one\ntwo", "id": 3}) + "\n\n" + json.dumps({"text": "three"}) + "\n")
    assert read_texts(path) == ["one\ntwo", "three"]
    path.write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"content": "two"}) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: no column `text` that holds a string; found content"):
        read_texts(path)


def test_a_text_without_tokens_and_a_chunk_that_does_not_fit_stop_ppo(opened, functions, tmp_path):
    (tmp_path / "plain.txt").write_text("x")
    with pytest.raises(DataError, match=r"plain\.txt: no text of at least two tokens"):
        ppo.ppo(opened(reward_function="ones", **LEARNS))
    with pytest.raises(DataError, match="ppo.ptx_length is 16385; the model's context holds 16384 tokens"):
        ppo.ppo(opened("long", reward_function="ones", **{**LEARNS, "ptx_length": 16385}))


# --- the gradient ----------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_the_tokens_drawn_and_its_gradient_reaches_the_policy_alone(opened, functions, text):
    run = opened(reward_function="ones", **LEARNS)
    actors = assign_roles(run)
    ptx = Ptx.load(run, actors.base)
    ptx = ptx._replace(chunks=[chunk[: 2 + 5 * place] for place, chunk in enumerate(ptx.chunks)])  # of many lengths
    found, drawn = {}, ptx.draw(7, 3)
    assert len({len(chunk) for chunk in drawn}) > 1
    for microbatch in (1, 3):
        actors.base.lm.zero_grad(set_to_none=True)
        loss = ptx.backward(7, actors.settings.model_copy(update={"microbatch": microbatch}))
        assert loss == pytest.approx(nll(actors.base, drawn), rel=1e-5)
        found[microbatch] = {n: p.grad.clone() for n, p in actors.base.lm.named_parameters() if p.grad is not None}
    assert found[1].keys() == {name for name, _ in actors.base.named_parameters_of(POLICY)} - {"heads.policy.weight"}
    moved = {name: one for name, one in found[1].items() if one.abs().max() > 0}
    tiny_ppo.assert_close(moved, found[3])
    actors.base.lm.zero_grad(set_to_none=True)
    with actors.base.acting_as(POLICY, training=True):
        (LEARNS["ptx_coef"] * summed_loss(actors.base, drawn) / sum(len(chunk) - 1 for chunk in drawn)).backward()
    whole = dict(actors.base.lm.named_parameters())
    tiny_ppo.assert_close({name: whole[name].grad for name in moved}, moved)


def test_draws_depend_on_the_seed_alone_and_reach_every_chunk(opened, functions, text):
    run = opened(reward_function="ones", **LEARNS)
    ptx = Ptx.load(run, assign_roles(run).base)
    assert ptx.draw(1, 5) == ptx.draw(1, 5) != ptx.draw(2, 5)
    seen = {tuple(chunk) for seed in range(40) for chunk in ptx.draw(seed, 3)}
    assert seen == {tuple(chunk) for chunk in ptx.chunks}


def test_some_chunks_are_held_out_and_their_loss_is_a_mean_over_their_tokens(opened, functions, text):
    run = opened(reward_function="ones", **LEARNS)
    base = assign_roles(run).base
    ptx, whole = Ptx.load(run, base), cut(base, TEXT, 32)
    assert len(ptx.heldout) == 2
    assert sorted(ptx.chunks + ptx.heldout) == sorted(whole)
    assert Ptx.load(run, base).heldout == ptx.heldout
    ptx = ptx._replace(heldout=[ptx.heldout[0], ptx.heldout[1][:5]])
    for microbatch in (1, 2):
        assert ptx.figures(microbatch) == {"ptx/heldout_loss": pytest.approx(nll(base, ptx.heldout), rel=1e-5)}
    for wanted, held_out in ((0, 0), (99, len(whole) // 2)):
        other = Ptx.load(opened(f"{wanted}", reward_function="ones", **{**LEARNS, "ptx_heldout": wanted}), base)
        assert (len(other.heldout), len(other.chunks)) == (held_out, len(whole) - held_out)
    assert ptx._replace(heldout=[]).figures(1) == {}


# --- in a run --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_coefficient_of_0_is_plain_ppo_to_the_bit(opened, functions, text):
    plain = opened("plain", reward_function="small_letters", updates=2)
    ppo.ppo(plain)
    off = opened("off", reward_function="small_letters", updates=2, **{**LEARNS, "ptx_coef": 0.0})
    ppo.ppo(off)
    on = opened("on", reward_function="small_letters", updates=2, **LEARNS)
    ppo.ppo(on)
    without = [{key: value for key, value in row.items() if key != "ptx/heldout_loss"} for row in metrics(off)]
    assert without == metrics(plain)
    assert {**results(off), "metrics.jsonl": b""} == {**results(plain), "metrics.jsonl": b""}
    assert "policy/adapter_model.safetensors" in results(off)
    assert "ptx/loss" not in metrics(off)[0]
    assert [row["ptx/heldout_loss"] for row in (metrics(off)[0], metrics(on)[0])] == [
        pytest.approx(math.log(259), abs=2)
    ] * 2
    assert "ptx/heldout_loss" not in metrics(plain)[0]
    assert metrics(on)[0]["ptx/loss"] == pytest.approx(math.log(259), abs=2)  # a model of random weights
    assert results(on)["policy/adapter_model.safetensors"] != results(plain)["policy/adapter_model.safetensors"]


@pytest.mark.slow
def test_a_run_with_text_cut_off_and_resumed_equals_one_that_was_not(opened, functions, text, monkeypatch):
    settings = {"reward_function": "small_letters", "updates": 3, **LEARNS}
    whole = opened("whole", **settings)
    ppo.ppo(whole)
    resumed = opened("resumed", **settings)
    cut_off(resumed, monkeypatch, "record", update=1)
    with monkeypatch.context() as patch, pytest.raises(Stopped):  # in the middle of an update's steps
        calls = []
        backward = Ptx.backward
        patch.setattr(Ptx, "backward", lambda self, *args: calls.append(1) or len(calls) < 2 and backward(self, *args)
                      or (_ for _ in ()).throw(Stopped))  # fmt: skip
        ppo.ppo(resumed)
    ppo.ppo(resumed)
    assert results(resumed) == results(whole)


def test_the_text_counts_for_the_stages_inputs_by_its_content(opened, functions, text, tmp_path):
    before = ppo.inputs(opened(reward_function="ones", **LEARNS))
    assert "ptx" in before and "ptx" not in ppo.inputs(opened("off", reward_function="ones"))
    (tmp_path / "other.txt").write_text(TEXT)
    renamed = ppo.inputs(opened("renamed", reward_function="ones", **{**LEARNS, "ptx_file": "other.txt"}))
    assert renamed == before
    (tmp_path / "other.txt").write_text(TEXT + "more")
    changed = ppo.inputs(opened("changed", reward_function="ones", **{**LEARNS, "ptx_file": "other.txt"}))
    assert {key for key in before if changed[key] != before[key]} == {"ptx"}


@pytest.mark.slow
def test_held_out_text_is_forgotten_less_with_it_than_without(opened, functions, text, monkeypatch):
    """PPO away from small letters makes a text of them less likely; the same steps with other such text do not."""
    held_out = "The dog sat at the mat, and the cat lay on the door. "
    losses, finish, assign = {}, ppo.finish, ppo.assign_roles

    def measure(actors, when):
        losses.setdefault(when, nll(actors.base, cut(actors.base, held_out, 64)))
        return actors

    monkeypatch.setattr(ppo, "assign_roles", lambda run: measure(assign(run), "before"))
    monkeypatch.setattr(ppo, "finish", lambda run, actors: finish(run, measure(actors, run.recipe.ppo.ptx_coef)))
    steps = {"updates": 6, "rollout_batch": 8, "minibatch": 8, "microbatch": 8, "learning_rate": 3e-3}
    steps |= {"reward_function": "few_small_letters", "critic": "trunk", "sections": tiny_runs.ALL_PROJECTIONS}
    for coef in (0.0, 1.0):
        ppo.ppo(opened(f"coef-{coef:g}", **steps, **{**LEARNS, "ptx_coef": coef}))
    assert losses[1.0] < losses["before"] < losses[0.0], losses
