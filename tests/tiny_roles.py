"""The tiny model with roles: what the tests of `rlaif.model` share."""

import hashlib
from functools import cache

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import LlamaForCausalLM

from rlaif.model import sampling
from rlaif.model.roles import SharedBase
from rlaif.recipe import ModelSection

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPTS = [[1, 70, 71, 72, 73], [1, 80], [1, 90, 91, 92]]
RESPONSES = [[100, 101, 2], [110, 111, 112, 113, 2], [120]]
ROUNDING = {"rtol": 1e-3, "atol": 1e-4}  # fp32 sums in another order, through two layers and back


@cache
def why_not_four_bits():
    """The reason why bitsandbytes cannot quantize on this machine; empty where it can."""
    try:
        weights = torch.ones(64, 64, device="cuda" if torch.cuda.is_available() else "cpu")
        dequantize_4bit(*quantize_4bit(weights, quant_type="nf4"))
    except (RuntimeError, NotImplementedError, OSError) as problem:
        return f"bitsandbytes has no 4-bit kernels here: {problem}"
    return ""


def load(folder, **keys):
    if keys.get("load_in_4bit") and why_not_four_bits():
        pytest.skip(why_not_four_bits())
    return SharedBase.load(ModelSection(model_name_or_path=str(folder), lora_r=4, **keys))


def stir(base, role, seed):
    """Move a role away from zero: a new adapter's B and a new head are zero, which hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in base.named_parameters_of(role):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def add_stirred(base, role, seed, **keys):
    base.add_role(role, **keys)
    stir(base, role, seed)


def batch_of(base):
    return sampling.pack(base, PROMPTS, RESPONSES)


def policy_loss(base):
    batch = batch_of(base)
    logits = sampling.response_logits(base, batch, sampling.hidden_states(base, batch))
    return -(sampling.token_logprobs(logits, batch.response_ids) * batch.response_mask).mean()


def critic_loss(base):
    return (sampling.scores(base, "critic", batch_of(base)) - 1).square().mean()


def logits_of(base, role, *, training=False):
    """Logits at all real tokens, ``[tokens, V]``."""
    batch = batch_of(base)
    with torch.no_grad(), base.acting_as(role, training=training):
        return base.logits(sampling.hidden_states(base, batch))[batch.mask.bool()]


def scores_of(base, role):
    with torch.no_grad(), base.acting_as(role):
        return sampling.scores(base, role, batch_of(base))


def names_of(base, role):
    return {name for name, _ in base.named_parameters_of(role)}


def gradients(base, *roles):
    return {name: p.grad.clone() for role in roles for name, p in base.named_parameters_of(role) if p.grad is not None}


def clear(base, *roles):
    for role in roles:
        for _, parameter in base.named_parameters_of(role):
            parameter.grad = None


def digests(base):
    """Hash every tensor of the model by name: 4-bit weights and their scales, adapters and heads."""
    state = {name: value for name, value in base.lm.state_dict().items() if isinstance(value, torch.Tensor)}
    state |= {f"heads.{name}": value for name, value in base.heads.state_dict().items()}
    return {
        name: hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()).hexdigest()
        for name, value in state.items()
    }


def save_dequantized(base, folder, target):
    """Write the model of `folder` with the weights that a 4-bit base made of it stands for, in fp32."""
    plain = LlamaForCausalLM.from_pretrained(folder)
    layers = [(name, module) for name, module in base.lm.named_modules() if isinstance(module, Linear4bit)]
    assert len(layers) == len(PROJECTIONS) * plain.config.num_hidden_layers
    with torch.no_grad():
        for name, layer in layers:
            weight = plain.get_submodule(name.removesuffix(".base_layer")).weight
            weight.copy_(dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    plain.save_pretrained(target)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (target / file).write_bytes((folder / file).read_bytes())
