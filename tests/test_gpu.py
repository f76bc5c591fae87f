import gc

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import build_tiny_model
from tiny_roles import (
    PROMPTS,
    ROUNDING,
    add_stirred,
    clear,
    digests,
    gradients,
    load,
    logits_of,
    names_of,
    policy_loss,
    save_dequantized,
)

from rlaif.errors import RoleError
from rlaif.model import sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; torch sees none"),
]

BF16_ROUNDING = 0.2  # nats: two layers in bf16, in batches of another shape
HIDDEN = 512  # wide enough for weights to outweigh the rest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("gpu") / "model", hidden=HIDDEN)


@pytest.fixture
def base(folder):
    base = load(folder, load_in_4bit=True)
    add_stirred(base, "policy", 1, trainable=True)
    return base


def held(make):
    """Bytes on the GPU that making something keeps."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    kept = make()
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before, kept


def peak_of_a_step(base):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    batch = sampling.pack(base, [list(range(3, 200))] * 16, [list(range(3, 100))] * 16)
    with base.acting_as("policy", training=True):
        hidden = sampling.hidden_states(base, batch)
        hidden.float().square().mean().backward()
    torch.cuda.synchronize()
    clear(base, "policy")
    return torch.cuda.max_memory_allocated() - before


def test_a_base_computes_in_bf16_and_keeps_adapters_and_heads_in_fp32(base):
    assert base.device == torch.device("cuda", 0)
    assert {p.dtype for name, p in base.lm.named_parameters() if "embed_tokens" in name} == {torch.bfloat16}
    base.add_role("reward", head=True)
    for role in ("policy", "reward"):
        assert {p.dtype for _, p in base.named_parameters_of(role)} == {torch.float32}
        assert {p.device.type for _, p in base.named_parameters_of(role)} == {"cuda"}


def test_four_bits_take_less_than_a_third_of_bf16s_memory(folder):
    four, quantized = held(lambda: load(folder, load_in_4bit=True))
    sixteen, _ = held(lambda: load(folder))
    layers = [module for module in quantized.lm.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14 and {layer.weight.dtype for layer in layers} == {torch.uint8}
    unquantized = 2 * 2 * 259 * HIDDEN  # embeddings and vocabulary projection in bf16
    assert 0 < four - unquantized < (sixteen - unquantized) / 3


def test_a_second_role_takes_the_memory_of_its_adapter_only(base):
    size = sum(p.numel() * p.element_size() for _, p in base.named_parameters_of("policy"))
    grown, _ = held(lambda: base.add_role("reference", like="policy"))
    assert size <= grown <= size + 512 * len(names_of(base, "policy"))  # the allocator rounds each tensor up


def test_sampled_logprobs_are_the_teacher_forced_ones(base):
    with base.acting_as("policy"):
        responses = sampling.sample(base, PROMPTS, max_new_tokens=16, seeds=[1, 2, 3], temperature=0.8)
        batch = sampling.pack(base, PROMPTS, [response.ids for response in responses])
        with torch.no_grad():
            logits = sampling.response_logits(base, batch, sampling.hidden_states(base, batch), 0.8)
    logprobs = sampling.token_logprobs(logits, batch.response_ids)
    for row, response in enumerate(responses):
        assert logprobs[row, : len(response.ids)].tolist() == pytest.approx(response.logprobs, abs=BF16_ROUNDING)
    with base.acting_as("policy"):
        again = sampling.sample(base, PROMPTS, max_new_tokens=16, seeds=[1, 2, 3], temperature=0.8)
    assert [response.ids for response in again] == [response.ids for response in responses]


def test_a_training_step_lowers_the_loss_and_moves_the_policy_only(base):
    base.add_role("reference", like="policy")
    before = digests(base)
    optimizer = torch.optim.AdamW([p for _, p in base.named_parameters_of("policy")], lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with base.acting_as("policy", training=True):
            loss = policy_loss(base)
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = digests(base)
    assert {name for name in after if after[name] != before[name]} == names_of(base, "policy")
    assert losses[-1] < losses[0]


def test_gradients_on_four_bits_equal_those_on_the_dequantized_weights(folder, tmp_path):
    quantized = load(folder, load_in_4bit=True, dtype="float32")
    add_stirred(quantized, "policy", 1, trainable=True)
    quantized.save_role("policy", tmp_path / "adapter")
    save_dequantized(quantized, folder, tmp_path / "model")
    dequantized = load(tmp_path / "model", dtype="float32")
    dequantized.add_role("policy", adapter=tmp_path / "adapter", trainable=True)
    logits_of(quantized, "policy")
    found = {}
    for base in (quantized, dequantized):
        with base.acting_as("policy", training=True):
            policy_loss(base).backward()
        found[base] = gradients(base, "policy")
    for name, gradient in found[dequantized].items():
        assert gradient.norm() > 0, name
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[quantized][name], gradient, rtol=ROUNDING["rtol"], atol=1e-4 * scale)


def test_gradient_checkpointing_gives_the_same_gradients_in_less_memory(folder, base):
    checkpointed = load(folder, load_in_4bit=True, gradient_checkpointing=True)
    add_stirred(checkpointed, "policy", 1, trainable=True)
    found = {}
    for one in (base, checkpointed):
        with one.acting_as("policy", training=True):
            policy_loss(one).backward()
        found[one] = gradients(one, "policy")
        clear(one, "policy")
    for name, gradient in found[base].items():
        torch.testing.assert_close(found[checkpointed][name], gradient, rtol=0, atol=1e-2 * gradient.abs().max().item())
    assert peak_of_a_step(checkpointed) < 0.8 * peak_of_a_step(base)


def test_recomputation_under_another_role_is_refused_from_autograds_own_thread(folder):
    base = load(folder, load_in_4bit=True, gradient_checkpointing=True)
    add_stirred(base, "policy", 1, trainable=True)
    with base.acting_as("policy", training=True):
        loss = policy_loss(base)
    with pytest.raises(RoleError, match="`policy` came after"):
        loss.backward()


def test_five_roles_of_a_1b_base_take_the_memory_that_the_model_says(tmp_path):
    from test_bench import loaded, told

    from rlaif.stages.run import Run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "load_base", Run.load_base)  # the script puts another in its place
        found = loaded("gpu").measure(told(shape="1b", prompt=256, new=128, rollout=16, microbatch=4), tmp_path)
    assert found["peak_gib"] == pytest.approx(found["expected_tensors_gib"], rel=0.2)
