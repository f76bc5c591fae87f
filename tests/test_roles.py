import pytest
import torch
from bitsandbytes.nn import Linear4bit
from tiny_roles import (
    PROJECTIONS,
    ROUNDING,
    add_stirred,
    clear,
    critic_loss,
    digests,
    gradients,
    load,
    logits_of,
    names_of,
    policy_loss,
    save_dequantized,
    scores_of,
    stir,
)

from rlaif.errors import RoleError
from rlaif.model.roles import BASE, SharedBase
from rlaif.recipe import ModelSection

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[False, True], ids=["fp32", "nf4"])
def keys(request, tiny_model, tiny_model_64):
    """Settings of a base in fp32 and in 4 bits."""
    return {"folder": tiny_model_64 if request.param else tiny_model, "load_in_4bit": request.param}


@pytest.fixture
def base(keys):
    return load(**keys)


def trainable_names(base):
    named = [*base.lm.named_parameters(), *((f"heads.{name}", p) for name, p in base.heads.named_parameters())]
    return {name for name, parameter in named if parameter.requires_grad}


def separate_gradients(base):
    with base.acting_as("policy", training=True):
        policy_loss(base).backward()
    with base.acting_as("critic", training=True):
        critic_loss(base).backward()
    result = gradients(base, "policy", "critic")
    clear(base, "policy", "critic")
    return result


# --- gradients and switches ----------------------------------------------------------------------------------------


def test_policy_gradient_survives_a_role_switch(base):
    add_stirred(base, "policy", 1, trainable=True)
    add_stirred(base, "critic", 2, trainable=True, head=True)
    expected = separate_gradients(base)
    with base.acting_as("policy", training=True):
        policy = policy_loss(base)
    with base.acting_as("critic", training=True):
        value = critic_loss(base)
        (policy + value).backward()
    found = gradients(base, "policy", "critic")
    assert found.keys() == expected.keys() == names_of(base, "policy") | names_of(base, "critic")
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(found[name], gradient, **ROUNDING)


def test_gradient_of_a_sum_is_the_sum_of_gradients_for_a_head_on_the_policy(base):
    add_stirred(base, "policy", 1, trainable=True)
    base.add_head_on("policy", "critic")
    stir(base, "critic", 2)
    with base.acting_as("policy", training=True):
        policy_loss(base).backward()
        critic_loss(base).backward()
    separate = gradients(base, "policy", "critic")
    clear(base, "policy", "critic")
    with base.acting_as("policy", training=True):
        (policy_loss(base) + critic_loss(base)).backward()
    summed = gradients(base, "policy", "critic")
    assert "heads.critic.weight" in summed
    for name, gradient in separate.items():
        torch.testing.assert_close(summed[name], gradient, **ROUNDING)


def test_backward_reaches_the_acting_role_only(base):
    for role in ("policy", "critic", "reference"):
        add_stirred(base, role, 1, trainable=role != "reference", head=role == "critic")
    with base.acting_as("policy", training=True):
        policy_loss(base).backward()
    with_gradient = {name for name, p in base.lm.named_parameters() if p.grad is not None}
    assert with_gradient == names_of(base, "policy")
    assert len(with_gradient) == 2 * 2 * len(PROJECTIONS)
    assert base.heads["critic"].weight.grad is None


def test_an_optimizer_sees_one_role_and_moves_nothing_else(base):
    add_stirred(base, "policy", 1, trainable=True)
    add_stirred(base, "critic", 2, trainable=True, head=True)
    base.add_role("reference", like="policy")
    add_stirred(base, "reward", 3, head=True)
    before = digests(base)
    optimizer = torch.optim.AdamW([p for _, p in base.named_parameters_of("policy")], lr=0.01)
    with base.acting_as("policy", training=True):
        policy_loss(base).backward()
    optimizer.step()
    after = digests(base)
    assert {name for name in after if after[name] != before[name]} == names_of(base, "policy")


def test_a_training_step_of_the_critic_moves_its_adapter_and_head_by_name(base):
    add_stirred(base, "policy", 1, trainable=True)
    add_stirred(base, "critic", 2, trainable=True, head=True)
    before = digests(base)
    optimizer = torch.optim.SGD([p for _, p in base.named_parameters_of("critic")], lr=0.1)
    with base.acting_as("critic", training=True):
        critic_loss(base).backward()
    optimizer.step()
    after = digests(base)
    assert {name for name in after if after[name] != before[name]} == names_of(base, "critic")


def test_four_bit_weights_are_among_the_bytes_compared(tiny_model_64):
    base = load(tiny_model_64, load_in_4bit=True)
    before = digests(base)
    next(m for m in base.lm.modules() if isinstance(m, Linear4bit)).weight.data[0] ^= 1
    assert sum(after != before[name] for name, after in digests(base).items()) == 1


# --- what is trainable ---------------------------------------------------------------------------------------------


def act(base, role):
    with base.acting_as(role, training=True):
        pass


SWITCHES = {
    "nothing": lambda base: None,
    "acting as a frozen role": lambda base: act(base, "reference"),
    "acting as a trainable role": lambda base: act(base, "policy"),
    "leaving base": lambda base: act(base, BASE),
    "frozen, base, trainable": lambda base: [act(base, role) for role in ("reward", BASE, "critic")],
    "set_adapter of PEFT, then a turn": lambda base: (base.peft.set_adapter("reference"), act(base, "reward")),
    "disable_adapter of PEFT, then a turn": lambda base: (base.peft.disable_adapter().__enter__(), act(base, BASE)),
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES.keys())
def test_frozen_roles_stay_frozen_and_trainable_ones_trainable(tiny_model, switch):
    base = load(tiny_model)
    base.add_role("policy", trainable=True)
    base.add_role("reference", like="policy")
    base.add_role("critic", trainable=True, head=True)
    base.add_role("reward", head=True)
    expected = {name.removesuffix(".weight") for role in ("policy", "critic") for name in names_of(base, role)}
    switch(base)
    assert {name.removesuffix(".weight") for name in trainable_names(base)} == expected
    act(base, "reference")
    assert {name.removesuffix(".weight") for name in trainable_names(base)} == expected


@pytest.mark.parametrize("role", ["policy", BASE])
def test_a_role_computes_the_same_after_peft_has_switched_behind_its_back(tiny_model, role):
    base = load(tiny_model)
    add_stirred(base, "policy", 1, trainable=True)
    add_stirred(base, "reference", 2)

    def loss():
        with base.acting_as(role), torch.no_grad():
            return policy_loss(base).item()

    expected = loss()
    for switch in (
        lambda: base.peft.set_adapter("reference"),
        lambda: base.peft.base_model.disable_adapter_layers(),
        lambda: base.peft.base_model.enable_adapter_layers(),
    ):
        switch()
        assert loss() == expected


def test_a_frozen_role_gets_no_gradient_while_it_acts(base):
    add_stirred(base, "policy", 1, trainable=True)
    add_stirred(base, "reference", 2)
    with base.acting_as("reference", training=True):
        assert not policy_loss(base).requires_grad
    assert gradients(base, "policy", "reference") == {}


def test_parameters_of_a_role_are_its_adapter_and_head(base):
    base.add_role("policy", trainable=True)
    base.add_role("critic", trainable=True, head=True)
    names = names_of(base, "critic")
    assert len(names) == 2 * 2 * len(PROJECTIONS) + 1 and "heads.critic.weight" in names
    assert all(".critic." in name for name in names)
    for projection in PROJECTIONS:
        assert sum(f".{projection}." in name for name in names) == 4
    assert not names & names_of(base, "policy")


def test_all_parameters_of_roles_are_fp32_on_any_base(base):
    base.add_role("critic", trainable=True, head=True)
    assert {p.dtype for _, p in base.named_parameters_of("critic")} == {torch.float32}
    assert scores_of(base, "critic").dtype == torch.float32


def test_a_head_computes_in_fp32_from_half_precision_states(base):
    base.add_role("critic", head=True)
    stir(base, "critic", 1)
    assert base.head("critic", torch.ones(2, 3, base.hidden_size, dtype=torch.bfloat16)).dtype == torch.float32
    assert base.head("critic", torch.ones(2, 3, base.hidden_size)).shape == (2, 3)


# --- gradient checkpointing ----------------------------------------------------------------------------------------


@pytest.fixture
def checkpointed(keys):
    base = load(**keys, gradient_checkpointing=True)
    add_stirred(base, "policy", 1, trainable=True)
    add_stirred(base, "critic", 2, trainable=True, head=True)
    return base


def test_gradient_checkpointing_gives_the_same_gradients(base, checkpointed):
    add_stirred(base, "policy", 1, trainable=True)
    add_stirred(base, "critic", 2, trainable=True, head=True)
    plain, recomputed = separate_gradients(base), separate_gradients(checkpointed)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, **ROUNDING)


def test_gradient_checkpointing_recomputes_layers(checkpointed):
    calls = []
    layer = checkpointed.lm.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda *_: calls.append(1))
    with checkpointed.acting_as("policy", training=True):
        loss = policy_loss(checkpointed)
        assert len(calls) == 1
        loss.backward()
    assert len(calls) == 2


def test_recomputation_after_a_role_has_acted_is_refused(checkpointed):
    with checkpointed.acting_as("policy", training=True):
        loss = policy_loss(checkpointed)
    with pytest.raises(RoleError, match="`policy` came after its `acting_as` had ended .no role does."):
        loss.backward()
    assert gradients(checkpointed, "critic") == {}


@pytest.mark.parametrize("other", ["critic", BASE])
def test_recomputation_under_another_role_is_refused(checkpointed, other):
    with checkpointed.acting_as("policy", training=True):
        loss = policy_loss(checkpointed)
    with checkpointed.acting_as(other, training=True), pytest.raises(RoleError, match=f"`{other}` acts"):
        loss.backward()


def test_recomputation_in_a_later_turn_of_the_same_role_is_refused(checkpointed):
    with checkpointed.acting_as("policy", training=True):
        loss = policy_loss(checkpointed)
    with checkpointed.acting_as("policy", training=True), pytest.raises(RoleError, match="Call backward inside"):
        loss.backward()


def test_summed_losses_of_two_roles_are_refused_under_checkpointing(checkpointed):
    with checkpointed.acting_as("policy", training=True):
        policy = policy_loss(checkpointed)
    with checkpointed.acting_as("critic", training=True):
        value = critic_loss(checkpointed)
        with pytest.raises(RoleError, match="`policy`"):
            (policy + value).backward()


# --- who may act ---------------------------------------------------------------------------------------------------


def test_acting_does_not_nest(base):
    base.add_role("policy", trainable=True)
    with base.acting_as("policy"):
        with pytest.raises(RoleError, match="does not nest"), base.acting_as(BASE):
            pass
        assert base.acting == "policy"
    assert base.acting is None


def test_the_model_refuses_to_run_outside_of_a_turn(base):
    base.add_role("policy", trainable=True)
    ids = torch.tensor([[1, 5]])
    for run in (base.trunk, base.lm, base.peft):
        with pytest.raises(RoleError, match="outside"):
            run(input_ids=ids)
    with base.acting_as("policy"):
        base.trunk(input_ids=ids)
    with pytest.raises(RoleError, match="outside"):
        base.trunk(input_ids=ids)


def test_a_turn_ends_with_an_error_inside_of_it(base):
    base.add_role("policy", trainable=True)
    with pytest.raises(ZeroDivisionError), base.acting_as("policy", training=True):
        1 / 0  # noqa: B018
    assert base.acting is None and not base.lm.training
    with base.acting_as("policy"):
        policy_loss(base)


@pytest.mark.parametrize("role", ["nobody", "critic"])
def test_unknown_roles_and_heads_on_others_do_not_act(tiny_model, tmp_path, role):
    base = load(tiny_model)
    base.add_role("policy", trainable=True)
    base.add_head_on("policy", "critic")
    for attempt in (
        lambda: base.acting_as(role).__enter__(),
        lambda: base.save_role(role, tmp_path / "adapter"),
        lambda: base.add_role("copy", like=role),
    ):
        with pytest.raises(RoleError, match=f"unknown role `{role}`; roles with an adapter: policy"):
            attempt()
    assert not (tmp_path / "adapter").exists()


def test_roles_are_added_once_and_between_turns(base):
    base.add_role("policy")
    for add in (lambda: base.add_role("policy"), lambda: base.add_role(BASE)):
        with pytest.raises(RoleError, match="exists already"):
            add()
    with base.acting_as("policy"), pytest.raises(RoleError, match="a role is acting"):
        base.add_role("late")
    with pytest.raises(RoleError, match="unknown"):
        base.add_head_on("nobody", "critic")
    with pytest.raises(RoleError, match="taken"):
        base.add_head_on("policy", "policy")


def test_a_base_without_roles_has_no_peft_model(tiny_model):
    base = load(tiny_model)
    with pytest.raises(RoleError, match="no role"):
        base.peft  # noqa: B018


# --- what roles compute --------------------------------------------------------------------------------------------


def test_a_new_role_computes_what_the_base_computes(base):
    alone = logits_of(base, BASE)
    base.add_role("policy", trainable=True, head=True)
    torch.testing.assert_close(logits_of(base, "policy"), alone, rtol=0, atol=0)
    torch.testing.assert_close(logits_of(base, BASE), alone, rtol=0, atol=0)
    assert scores_of(base, "policy").tolist() == [0.0, 0.0, 0.0]


def test_roles_differ_and_base_is_untouched_by_them(base):
    alone = logits_of(base, BASE)
    add_stirred(base, "policy", 1)
    add_stirred(base, "other", 2)
    assert (logits_of(base, "policy") - alone).abs().max() > 0.01
    assert (logits_of(base, "policy") - logits_of(base, "other")).abs().max() > 0.01
    torch.testing.assert_close(logits_of(base, BASE), alone, rtol=0, atol=0)


def test_a_reference_is_an_exact_frozen_copy_that_stays_behind(base):
    add_stirred(base, "policy", 1, trainable=True, head=True)
    base.add_role("reference", like="policy", head=True)
    expected = logits_of(base, "policy")
    torch.testing.assert_close(logits_of(base, "reference"), expected, rtol=0, atol=0)
    torch.testing.assert_close(scores_of(base, "reference"), scores_of(base, "policy"), rtol=0, atol=0)
    stir(base, "policy", 2)
    torch.testing.assert_close(logits_of(base, "reference"), expected, rtol=0, atol=0)
    assert not any(p.requires_grad for _, p in base.named_parameters_of("reference"))


def test_a_copy_has_the_rank_and_alpha_of_the_role_it_copies(tiny_model, tmp_path):
    wide = SharedBase.load(ModelSection(model_name_or_path=str(tiny_model), lora_r=6, lora_alpha=3))
    add_stirred(wide, "policy", 1)
    wide.save_role("policy", tmp_path / "adapter")
    base = load(tiny_model)
    base.add_role("policy", adapter=tmp_path / "adapter")
    base.add_role("reference", like="policy")
    torch.testing.assert_close(logits_of(base, "reference"), logits_of(wide, "policy"), rtol=0, atol=0)


def test_training_mode_changes_no_output(base):
    add_stirred(base, "policy", 1, trainable=True)
    expected = logits_of(base, "policy")
    with base.acting_as("policy", training=True):
        assert base.lm.training
    torch.testing.assert_close(logits_of(base, "policy", training=True), expected, rtol=0, atol=0)


# --- a regression --------------------------------------------------------------------------------------------------


def test_gradients_on_four_bits_equal_those_on_the_dequantized_weights(tiny_model_64, tmp_path):
    """On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks weights at the first forward pass in evaluation mode.

    The kernel they are packed for has no backward pass: gradients vanished, with a warning at most.
    """
    quantized = load(tiny_model_64, load_in_4bit=True)
    add_stirred(quantized, "policy", 1, trainable=True)
    quantized.save_role("policy", tmp_path / "adapter")
    save_dequantized(quantized, tiny_model_64, tmp_path / "model")
    dequantized = load(tmp_path / "model")
    dequantized.add_role("policy", adapter=tmp_path / "adapter", trainable=True)

    first = logits_of(quantized, "policy")  # in evaluation mode, before any training
    torch.testing.assert_close(first, logits_of(dequantized, "policy"), **ROUNDING)
    found = {}
    for base in (quantized, dequantized):
        with base.acting_as("policy", training=True):
            policy_loss(base).backward()
        found[base] = gradients(base, "policy")
    assert found[quantized].keys() == names_of(quantized, "policy")
    for name, gradient in found[dequantized].items():
        assert gradient.norm() > 1e-6, name
        torch.testing.assert_close(found[quantized][name], gradient, **ROUNDING)


def test_no_four_bit_layer_may_use_the_kernel_without_a_backward_pass(tiny_model_64):
    base = load(tiny_model_64, load_in_4bit=True)
    assert not any(m.support_avx512bf16_for_cpu for m in base.lm.modules() if isinstance(m, Linear4bit))
