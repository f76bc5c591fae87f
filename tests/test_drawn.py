"""Figures of response tokens, and their gradients, against whole padded rows and plain log-softmax."""

import shutil

import pytest
import torch
from test_base import FAMILIES, save_beside
from tiny_roles import add_stirred, clear, gradients, load

from rlaif.model import drawn, sampling
from rlaif.model.drawn import token_figures, token_states
from rlaif.model.groups import Group, Layout

pytestmark = pytest.mark.usefixtures("one_thread")

SYSTEM = list(range(40, 60))  # longer than what must be shared before it is computed once
PROMPTS = [[*SYSTEM, 70, 71], [1, 80], [*SYSTEM, 70, 71], [*SYSTEM, 75, 76, 77], [*SYSTEM, 70, 71]]
RESPONSES = [[100, 101, 2], [120], [100, 9, 9, 9, 2], [2], [7]]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def plain(base, batch, temperature):
    """Both figures by the padded model's own logits, ``[B, T]``."""
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
    length = batch.response_ids.shape[1]
    logprobs = (base.lm(**inputs).logits[:, -length - 1 : -1] / temperature).log_softmax(-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(2, batch.response_ids.unsqueeze(2)).squeeze(2), entropies


def ours(base, batch, temperature):
    return token_figures(base, batch, token_states(base, batch), temperature, learn_entropy=True)


def figures_and_gradients(base, found, temperature):
    batch = sampling.pack(base, PROMPTS, RESPONSES)
    mask = batch.response_mask
    weights = torch.arange(1.0, mask.sum() + 1)
    clear(base, "policy")
    with base.acting_as("policy", training=True):
        logprobs, entropies = found(base, batch, temperature)
        (logprobs[mask] * weights + entropies[mask] * weights.flip(0)).sum().backward()
    return torch.stack([logprobs[mask], entropies[mask]]).detach(), gradients(base, "policy")


def assert_alike(base, temperature=1.0):
    expected, wanted = figures_and_gradients(base, plain, temperature)
    found, got = figures_and_gradients(base, ours, temperature)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert found.std() > 0.01
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.fixture
def base(tiny_model):
    base = load(tiny_model)
    add_stirred(base, "policy", 1, trainable=True)
    return base


@pytest.mark.parametrize(("chunk", "temperature"), [(256, 1.0), (3, 0.7)])
def test_figures_and_gradients_are_those_of_whole_padded_rows(base, chunk, temperature, monkeypatch):
    monkeypatch.setattr(drawn, "_CHUNK", chunk)
    assert base.packs
    assert_alike(base, temperature)


def test_where_attention_cannot_be_replaced_and_logits_are_capped(tiny_model, tmp_path):
    torch.manual_seed(0)
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    save_beside(FAMILIES["gemma2"](), folder)
    base = load(folder, attn_implementation="eager")
    add_stirred(base, "policy", 1, trainable=True)
    assert not base.packs
    assert_alike(base)


def test_an_adapter_on_the_projection_is_learned_as_well(tiny_model):
    base = load(tiny_model, lora_target_modules=["q_proj", "lm_head"])
    add_stirred(base, "policy", 1, trainable=True)
    assert any("lm_head" in name for name, _ in base.named_parameters_of("policy"))
    assert_alike(base)


def test_a_pass_without_gradients_gives_the_same_numbers_to_the_bit(base):
    batch = sampling.pack(base, PROMPTS, RESPONSES)
    with base.acting_as("policy", training=True):
        one = token_figures(base, batch, token_states(base, batch))
        with torch.no_grad():
            other = token_figures(base, batch, token_states(base, batch))
    assert one.logprobs.requires_grad and not other.logprobs.requires_grad
    assert torch.equal(one.logprobs, other.logprobs)
    assert torch.equal(one.entropies, other.entropies)


def test_only_the_entropy_that_is_to_be_learned_has_a_gradient(base):
    batch = sampling.pack(base, PROMPTS, RESPONSES)
    with base.acting_as("policy", training=True):
        states = token_states(base, batch)
        logprobs, entropies = token_figures(base, batch, states)
        (logprobs.sum() + 5.0 * entropies.sum()).backward()
        got = gradients(base, "policy")
        clear(base, "policy")
        token_figures(base, batch, token_states(base, batch)).logprobs.sum().backward()
    assert all(torch.equal(got[name], gradient) for name, gradient in gradients(base, "policy").items())


def test_forbidden_tokens_leave_finite_figures_and_gradients(base, monkeypatch):
    usual = base.logits
    forbidden = torch.zeros(len(base.lm.get_output_embeddings().weight)).index_fill_(
        0, torch.tensor([5, 6]), -torch.inf
    )
    monkeypatch.setattr(base, "logits", lambda hidden: usual(hidden) + forbidden)
    found, got = figures_and_gradients(base, ours, 1.0)
    assert found.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in got.values())


def test_what_rows_begin_with_in_common_stands_in_a_pass_once(base):
    groups = [Group(PROMPTS[0], [RESPONSES[0], RESPONSES[2]]), Group(PROMPTS[1], [[120]]), Group(PROMPTS[3], [[2]])]
    layout = Layout(groups, base.device)
    assert layout.ids == [*SYSTEM, 70, 71, 100, 101, 2, 100, 9, 9, 9, 2, 1, 80, 120, 75, 76, 77, 2]
    assert layout.positions[0].tolist() == [*range(25), *range(22, 27), 0, 1, 2, 20, 21, 22, 23]
    assert layout.places[3] == [*range(20), 33, 34, 35, 36]
    assert layout.ends.tolist() == [24, 29, 32, 36]


def test_a_row_that_an_earlier_one_begins_with_keeps_its_last_token(base):
    layout = Layout([Group([*SYSTEM, 70], [[100]]), Group(SYSTEM, [[]])], base.device)
    assert layout.ids == [*SYSTEM, 70, 100, SYSTEM[-1]]
    assert layout.places[1] == [*range(19), 22]
