"""Responses scored beside each other behind one prompt have the scores and gradients of whole rows."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from test_base import FAMILIES, save_beside
from tiny_roles import PROJECTIONS, add_stirred, clear, gradients, load

from rlaif.errors import RoleError
from rlaif.model import lora, sampling
from rlaif.model.groups import Group, hidden_at_ends, score_groups

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPS = [
    Group([1, 70, 71, 72, 73], [[100, 101, 2], [110, 111, 112, 113, 2]]),
    Group([1, 80], [[120]]),
    Group([1, 90, 91], [[5, 2], [6, 2], [9, 9, 9, 2], [2]]),
]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def rows_of(groups):
    return [(group.prompt, response) for group in groups for response in group.responses]


def padded_scores(base, groups):
    rows = rows_of(groups)
    batch = sampling.pack(base, [prompt for prompt, _ in rows], [response for _, response in rows])
    return sampling.scores(base, "reward", batch)


def grouped_scores(base, groups):
    return score_groups(base, "reward", groups)


def trained(base, scores, groups=GROUPS):
    """Scores and gradients, each score with a weight of its own."""
    clear(base, "reward")
    with base.acting_as("reward", training=True):
        found = scores(base, groups)
        (found * torch.arange(1.0, len(found) + 1)).sum().backward()
    return found.detach(), gradients(base, "reward")


def apart(found, expected):
    """How far gradients are apart, as a share of their norms: the worst."""
    assert found.keys() == expected.keys()
    return max(((found[name] - gradient).norm() / gradient.norm()).item() for name, gradient in expected.items())


@pytest.fixture
def folder(tiny_model, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    for file in tiny_model.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.fixture(params=[False, True], ids=["fp32", "nf4"])
def four_bit(request):
    return request.param


@pytest.mark.parametrize("checkpointing", [False, True])
def test_scores_and_gradients_are_those_of_whole_padded_rows(tiny_model_64, four_bit, checkpointing):
    base = load(tiny_model_64, load_in_4bit=four_bit, gradient_checkpointing=checkpointing)
    add_stirred(base, "reward", 1, trainable=True, head=True)
    assert base.packs
    expected, wanted = trained(base, padded_scores)
    found, got = trained(base, grouped_scores)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert len(wanted) == 2 * 2 * len(PROJECTIONS) + 1
    assert apart(got, wanted) < 1e-5
    assert found.std() > 0.01


@pytest.mark.parametrize(("family", "packs"), [("gpt2", True), ("qwen2", True), ("gemma2", False)])
def test_other_families_packed_or_not(folder, family, packs):
    torch.manual_seed(0)
    save_beside(FAMILIES[family](), folder)
    base = load(folder, attn_implementation="sdpa" if packs else "eager")
    add_stirred(base, "reward", 1, trainable=True, head=True)
    assert base.packs == packs
    expected, wanted = trained(base, padded_scores)
    found, got = trained(base, grouped_scores)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert apart(got, wanted) < 1e-5


def test_what_else_stands_in_a_batch_changes_no_score(tiny_model):
    base = load(tiny_model)
    add_stirred(base, "reward", 1, head=True)
    singles = [Group(prompt, [response]) for prompt, response in rows_of(GROUPS)]
    with torch.no_grad(), base.acting_as("reward"):
        together = score_groups(base, "reward", GROUPS)
        alone = torch.cat([score_groups(base, "reward", [single]) for single in singles])
        backwards = score_groups(base, "reward", singles[::-1]).flip(0)
        assert hidden_at_ends(base, GROUPS).shape == (7, base.hidden_size)
    torch.testing.assert_close(alone, together, **CLOSE)
    torch.testing.assert_close(backwards, together, **CLOSE)


def test_no_gradient_reaches_a_response_of_another_group_or_its_sibling(tiny_model):
    base = load(tiny_model)
    add_stirred(base, "reward", 1, head=True)
    embedded = []

    def keep(module, arguments, output):
        embedded.append(output.requires_grad_())

    with base.acting_as("reward"):
        handle = base.lm.get_input_embeddings().register_forward_hook(keep)
        score_groups(base, "reward", GROUPS)[1].backward()  # the second response of the first group
        handle.remove()
    touched = embedded[0].grad[0].norm(dim=1) > 0
    assert touched.tolist() == [True] * 5 + [False] * 3 + [True] * 5 + [False] * 15


def test_a_backward_pass_after_the_role_acted_is_refused_with_checkpointing(tiny_model):
    base = load(tiny_model, gradient_checkpointing=True)
    add_stirred(base, "reward", 1, trainable=True, head=True)
    add_stirred(base, "other", 2, trainable=True)
    with base.acting_as("reward", training=True):
        loss = grouped_scores(base, GROUPS).sum()
    with base.acting_as("other", training=True), pytest.raises(RoleError, match="after its `acting_as` had ended"):
        loss.backward()
    with pytest.raises(RoleError, match="outside"):
        grouped_scores(base, GROUPS)


def test_each_role_has_its_own_scores_and_gradients(tiny_model):
    base = load(tiny_model)
    add_stirred(base, "reward", 1, trainable=True, head=True)
    add_stirred(base, "cost", 2, trainable=True, head=True)
    first, wanted = trained(base, grouped_scores)
    with base.acting_as("cost", training=True):
        other = score_groups(base, "cost", GROUPS)
        other.sum().backward()
    assert (other - first).abs().min() > 1e-4
    assert gradients(base, "cost").keys() == {name for name, _ in base.named_parameters_of("cost")}
    again, got = trained(base, grouped_scores)
    assert torch.equal(again, first)
    assert all(torch.equal(got[name], gradient) for name, gradient in wanted.items())


def test_attention_is_back_after_a_recomputed_backward_pass(tiny_model):
    base = load(tiny_model, gradient_checkpointing=True)
    add_stirred(base, "reward", 1, trainable=True, head=True)
    before, _ = trained(base, padded_scores)
    trained(base, grouped_scores)
    assert base.lm.config._attn_implementation == "sdpa"
    after, _ = trained(base, padded_scores)
    assert torch.equal(after, before)


# --- the training pass of LoRA ---------------------------------------------------------------------------------------


def fused_and_not(base, monkeypatch):
    """Train once by LoRA's own pass in every adapted layer, and once by PEFT's in all."""
    calls, apply = [], lora._Adapted.apply
    monkeypatch.setattr(lora._Adapted, "apply", lambda *args: calls.append(1) or apply(*args))
    fused = trained(base, grouped_scores)
    assert len(calls) == 2 * len(PROJECTIONS)
    monkeypatch.setattr(lora, "_fits", lambda layer, x: False)
    other = trained(base, grouped_scores)
    assert len(calls) == 2 * len(PROJECTIONS)
    return fused, other


def test_the_training_pass_of_lora_gives_the_numbers_of_peft(tiny_model_64, four_bit, monkeypatch):
    base = load(tiny_model_64, load_in_4bit=four_bit)
    add_stirred(base, "reward", 1, trainable=True, head=True)
    (found, got), (expected, wanted) = fused_and_not(base, monkeypatch)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert apart(got, wanted) < 1e-5


@pytest.fixture
def half(monkeypatch):
    """Let a base be loaded on this CPU as it is on a GPU: ``half(torch.bfloat16, folder, ...)``."""

    def load_half(dtype, folder, **keys):
        monkeypatch.setattr("rlaif.model.base.compute_dtype", lambda name, device: dtype)
        base = load(folder, **keys)
        add_stirred(base, "reward", 1, trainable=True, head=True)
        return base

    return load_half


def test_on_a_base_in_bf16_it_gives_what_float64_gives_within_the_rounding_of_bf16(tiny_model_64, four_bit, half):
    base = half(torch.bfloat16, tiny_model_64, load_in_4bit=four_bit)
    layer = next(module for module in base.lm.modules() if isinstance(module, lora.LoraLayer))
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    a, b = layer.lora_A["reward"].weight, layer.lora_B["reward"].weight
    wide = [one.detach().double().requires_grad_() for one in (x, a, b)]
    weight = layer.base_layer.weight
    matrix = dequantize_4bit(weight.data, weight.quant_state) if four_bit else weight
    expected = wide[0] @ matrix.double().T + layer.scaling["reward"] * (wide[0] @ wide[1].T @ wide[2].T)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected.backward(gradient.double())
    with base.acting_as("reward", training=True):
        assert lora._fits(layer, x)
        found = layer(x)
        found.backward(gradient)
    assert (found.dtype, x.grad.dtype, a.grad.dtype, b.grad.dtype) == (torch.bfloat16,) * 2 + (torch.float32,) * 2
    for ours, theirs in zip((found, x.grad, a.grad, b.grad), (expected, *(one.grad for one in wide)), strict=True):
        assert (ours - theirs).norm() < 2**-7 * theirs.norm()


def test_on_a_base_in_bf16_it_gives_the_numbers_of_peft_within_the_rounding_of_bf16(
    tiny_model_64, four_bit, half, monkeypatch
):
    base = half(torch.bfloat16, tiny_model_64, load_in_4bit=four_bit)
    (found, got), (expected, wanted) = fused_and_not(base, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    # Either is up to 0.05 away from what fp32 gives with the same weights, through two layers and back.
    ours, theirs = (torch.cat([one[name].flatten() for name in wanted]) for one in (got, wanted))
    assert 0 < (ours - theirs).norm() < 0.1 * theirs.norm()
    assert {gradient.dtype for gradient in got.values()} == {torch.float32}


def test_a_small_step_of_an_adapter_on_bf16_is_kept_although_it_is_less_than_a_bf16_can_hold(tiny_model, half):
    base = half(torch.bfloat16, tiny_model)
    weight = base.named_parameters_of("reward")[0][1]
    before = weight.detach().clone()
    trained(base, grouped_scores)
    optimizer = torch.optim.SGD([weight], lr=(1e-4 * before.abs().max() / weight.grad.abs().max()).item())
    optimizer.step()
    moved = (weight != before).float().mean()
    assert moved > 0.9 and (weight.bfloat16() != before.bfloat16()).float().mean() < 0.1


def test_on_a_base_in_fp16_adapters_go_through_peft_in_fp32_where_small_gradients_do_not_vanish(tiny_model, half):
    base = half(torch.float16, tiny_model)
    layer = next(module for module in base.lm.modules() if isinstance(module, lora.LoraLayer))
    a, b = layer.lora_A["reward"].weight, layer.lora_B["reward"].weight
    b.data.fill_(1e-4)  # as after few steps from 0
    x = torch.ones(1, 32, dtype=torch.float16)
    gradient = torch.full((1, b.shape[0]), 1e-6, dtype=torch.float16)
    with base.acting_as("reward", training=True):
        assert not lora._fits(layer, x)
        layer(x).backward(gradient)
    assert a.grad.abs().min() > 0
    assert (gradient @ b.half()).abs().max() == 0  # what its products would be in fp16


def test_what_is_no_plain_training_pass_goes_through_peft(tiny_model):
    base = load(tiny_model)
    add_stirred(base, "reward", 1, trainable=True, head=True)
    layer = next(module for module in base.lm.modules() if isinstance(module, lora.LoraLayer))
    x = torch.randn(3, 32)
    with base.acting_as("reward"):
        assert lora._fits(layer, x)
        assert not lora._fits(layer, x.double())
        with torch.no_grad():
            assert not lora._fits(layer, x)
        layer.lora_dropout["reward"] = torch.nn.Dropout(0.1)
        assert not lora._fits(layer, x)
    with base.acting_as("base"):
        assert not lora._fits(layer, x)
