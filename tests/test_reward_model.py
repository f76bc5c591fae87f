"""A reward model put together from heads and adapters: members, combinations, and the critic that starts from it."""

import json

import pytest
import tiny_runs
import torch

from rlaif.errors import DataError, StageError
from rlaif.model import sampling
from rlaif.model.groups import Group
from rlaif.model.roles import SharedBase
from rlaif.recipe import Combination, ModelSection
from rlaif.records import Prompt
from rlaif.stages.reward_model import RewardModel, Scale, closed, part_folder, read_calibration, roles_of

GROUPS = [Group([1, 70, 71], [[80, 2], [81, 82, 2]]), Group([1, 72], [[83, 2]])]


@pytest.fixture
def base(tiny_model):
    return SharedBase.load(ModelSection(model_name_or_path=str(tiny_model)))


def stirred(base, role, outputs, seed):
    base.add_role(role, head=True, outputs=outputs)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in base.named_parameters_of(role):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_members_are_all_outputs_of_all_roles_padded_or_packed_alike(base):
    stirred(base, "reward", 2, 0)
    stirred(base, "reward-2", 1, 1)
    model = RewardModel(base, ["reward", "reward-2"], [Scale(0.0, 1.0)] * 3, Combination())
    packed = model.members(GROUPS)
    rows = [(group.prompt, response) for group in GROUPS for response in group.responses]
    batch = sampling.pack(base, *zip(*rows, strict=True))
    assert packed.shape == (3, 3)
    assert torch.allclose(packed, model.members(batch), atol=1e-5)
    assert len({round(value, 6) for value in packed[0].tolist()}) == 3


@pytest.mark.parametrize(
    ("combination", "expected"),
    [
        (Combination(), 0.5),
        (Combination(ensemble="worst"), -1.0),
        (Combination(ensemble="uncertainty", uncertainty_coef=0.5), 0.5 - 0.5 * 2.25),
    ],
)
def test_members_are_put_together_on_one_scale(base, combination, expected):
    """Members 3 and 4 are 2 and -1 deviations from their means."""
    model = RewardModel(base, [], [Scale(1.0, 1.0), Scale(5.0, 1.0)], combination)
    assert model.combine(torch.tensor([[3.0, 4.0]])).item() == pytest.approx(expected)
    assert model.scale == Scale(0.0, 1.0)


def test_some_members_alone_say_what_they_say_among_all_and_only_their_roles_are_run(base, monkeypatch):
    stirred(base, "reward", 2, 0)
    stirred(base, "reward-2", 2, 1)
    scales = [Scale(float(n), 1.0 + n) for n in range(4)]
    model = RewardModel(base, ["reward", "reward-2"], scales, Combination())
    every = model.members(GROUPS)
    kept, held_out = model.only(1, 2, 3), model.only(4)
    assert torch.equal(kept.members(GROUPS), every[:, :3])
    assert torch.equal(held_out.score(GROUPS), every[:, 3])
    assert (held_out.roles, held_out.scale) == (["reward-2"], scales[3])
    expected = sum((every[:, n] - n) / (1 + n) for n in range(3)) / 3
    assert torch.allclose(kept.score(GROUPS), expected, atol=1e-6)
    weight, offset = model.only(1, 3, 4).critic_start()  # of the first adapter the first head alone
    assert torch.allclose(weight, base.head_weight("reward")[:1])
    assert offset == 0.0


def test_a_response_that_does_not_fit_the_context_of_a_model_on_its_own_base_is_named(base):
    stirred(base, "reward", 1, 0)
    model = RewardModel(base, ["reward"], [Scale(0.0, 1.0)], Combination())
    base.max_length = 60
    rows = [Prompt(id="short", prompt="a"), Prompt(id="long", prompt="a" * 60)]
    with pytest.raises(DataError, match="`long`: prompt and response have .* its context holds 60. Shorten the prompt"):
        model.score_responses(None, rows, ["b", "b"], None, 2)


def test_one_member_keeps_its_number_whatever_the_combination(base):
    model = RewardModel(base, [], [Scale(1.0, 2.0)], Combination(ensemble="worst"))
    assert model.combine(torch.tensor([[3.0]])).item() == 3.0
    assert model.scale == Scale(1.0, 2.0)


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_critic_starts_with_what_the_mean_of_the_heads_says(base, outputs):
    stirred(base, "reward", outputs, 2)
    scales = [Scale(0.3 * n, 1.0 + n) for n in range(outputs)]
    model = RewardModel(base, ["reward"], scales, Combination())
    weight, offset = model.critic_start()
    base.add_role("critic", like="reward", head=True)
    base.heads["critic"] = torch.nn.Linear(base.hidden_size, 1, bias=False)
    with torch.no_grad():
        base.head_weight("critic").copy_(weight)
    critic = RewardModel(base, ["critic"], [Scale(0.0, 1.0)], Combination())
    assert torch.allclose(critic.score(GROUPS) - offset, model.score(GROUPS), atol=1e-5)


def test_a_model_is_loaded_with_all_its_adapters_from_what_the_stage_wrote(tmp_path, tiny_model):
    with tiny_runs.opened(tmp_path, tiny_model) as run:
        stage = run.stage_folder("reward")
        for seed, role in enumerate(roles_of("reward", 3)):
            tiny_runs.save_random_role(run, "reward", part_folder(stage, role) / "adapter", seed=seed, head=True)
        members = [{"offset": float(n), "scale": 1.0} for n in range(3)]
        (stage / "calibration.json").write_text(json.dumps({"members": members}))
        model = RewardModel.load(run.load_base(), stage, Combination())
    assert model.roles == ["reward", "reward-2", "reward-3"]
    assert [one.offset for one in model.scales] == [0.0, 1.0, 2.0]
    assert model.members(GROUPS).shape == (3, 3)


def test_a_folder_without_a_reward_model_is_named(tmp_path):
    with pytest.raises(StageError, match=r"holds no trained reward model.*run the stage `reward`"):
        read_calibration(tmp_path)


def test_responses_that_were_cut_off_are_closed_before_they_are_scored(base):
    """A score is read at the end of a turn; whether the policy has written it does not matter."""
    stirred(base, "reward", 1, 3)
    model = RewardModel(base, ["reward"], [Scale(0.0, 1.0)], Combination())
    end = base.tokenizer.end_of_turn
    cut = sampling.pack(base, [[1, 70], [1, 72]], [[80, 81, 82], [83]])
    ended = sampling.pack(base, [[1, 70], [1, 72]], [[80, 81, 82, end], [83, end]])
    assert torch.allclose(model.score(cut), model.score(ended), atol=1e-6)
    assert [group.responses for group in closed(base, cut)] == [[[80, 81, 82, end]], [[83, end]]]
    assert closed(base, cut) == closed(base, ended)
