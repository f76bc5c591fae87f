"""Packed passes: every token attends to the earlier ones of its own row, whatever else stands in the batch."""

import pytest
import torch
from test_base import FAMILIES, LAYERS, SMALL, save_beside
from tiny_roles import load, logits_of
from transformers import MistralConfig, MistralForCausalLM

from rlaif.model import attention, sampling
from rlaif.model.attention import Segment, Step, Store
from rlaif.model.roles import BASE

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = 1e-4  # sums of fp32 products in another order, in nats
PROMPTS = [[1, 70, 71, 72, 73, 74, 75], [1, 80], [5], [1, 90, 91, 92]]
WINDOWED = {"mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, **LAYERS, sliding_window=4))}


@pytest.fixture
def folder(tiny_model, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    for file in tiny_model.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def greedy(base, prompts):
    """What `transformers` writes to each prompt alone."""
    with torch.no_grad(), base.acting_as(BASE):
        return [
            base.lm.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=9,
                do_sample=False,
                eos_token_id=base.tokenizer.eos_ids,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
            for prompt in prompts
        ]


@pytest.mark.parametrize(("family", "packs"), [("gpt2", True), ("qwen2", True), ("gemma2", False), ("mistral", False)])
def test_other_families_write_what_transformers_writes(folder, family, packs):
    torch.manual_seed(0)
    save_beside((FAMILIES | WINDOWED)[family](), folder)
    base = load(folder, attn_implementation="eager" if family == "gemma2" else "sdpa")
    assert base.packs == packs
    with base.acting_as(BASE):
        found = sampling.sample(base, PROMPTS, max_new_tokens=9, seeds=range(4), temperature=0, rows=3)
    assert [sample.ids for sample in found] == greedy(base, PROMPTS)


def test_a_row_may_come_in_pieces_beside_others(tiny_model):
    base = load(tiny_model)
    rows = [[1, *range(60, 80)], [1, 90, 91, 92, 93]]
    with torch.no_grad(), base.acting_as(BASE):
        expected = [base.lm(input_ids=torch.tensor([row])).logits[0] for row in rows]
        store = Store(2, 21)
        first = Step(store, [7], [Segment(0, 0, 1, 8)], base.device)
        base.packed(first, [rows[0][7], *rows[0][:7]])
        second = Step(store, [20, 4], [Segment(0, 8, 2, 8), Segment(1, 0, 8, 12)], base.device)
        ids = [rows[0][20], rows[1][4], *rows[0][8:14], *rows[1][:4]]
        third = Step(store, [20], [Segment(0, 14, 1, 7)], base.device)
        middle = base.logits(base.packed(second, ids))
        last = base.logits(base.packed(third, [rows[0][20], *rows[0][14:20]]))
    torch.testing.assert_close(middle[2:8], expected[0][8:14], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(torch.cat([middle[8:12], middle[1:2]]), expected[1], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(torch.cat([last[1:], last[:1]]), expected[0][14:], rtol=0, atol=ROUNDING)


def test_the_models_own_attention_is_back_after_a_pass_that_failed(tiny_model):
    base = load(tiny_model)
    before = logits_of(base, BASE)
    step = Step(Store(1, 2), [1], [Segment(0, 0, 1, 2)], base.device)
    with base.acting_as(BASE), pytest.raises(IndexError):
        base.packed(step, [7, 10_000])
    assert base.lm.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits_of(base, BASE), before, rtol=0, atol=0)


def test_a_model_that_attends_in_another_way_is_found_out(tiny_model, monkeypatch):
    usual = Step.attend
    monkeypatch.setattr(Step, "attend", lambda self, *args: usual(self, *args[:-1], 2 * args[-1]))
    assert not load(tiny_model).packs
    monkeypatch.setattr(Step, "attend", usual)
    assert load(tiny_model).packs
    assert attention.replaceable(load(tiny_model).lm)
