"""What the reward stage can start from: adapters, and somebody else's reward model with a vocabulary of its own."""

import json

import pytest
import tiny_rewards
import tiny_runs
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_rows import ROWS
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification

from rlaif import files
from rlaif.errors import ConfigError, ModelError
from rlaif.model import sampling
from rlaif.model.groups import Group, score_groups
from rlaif.model.roles import SharedBase
from rlaif.recipe import ModelSection, load_recipe
from rlaif.records import Prompt
from rlaif.stages import reward
from rlaif.stages.actors import assign_roles, judge_tokens, score
from rlaif.stages.checkpoints import POLICY
from rlaif.stages.reward_model import encode_group

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")

HEAD = "base_model.model.score.weight"
STILL = {"max_steps": 1, "learning_rate": 1e-30, "suspects": 0}  # trains nothing away


@pytest.fixture
def opened(tmp_path, tiny_model):
    stack = []

    def open_run(folder="run", **sections):
        (tmp_path / folder).mkdir(exist_ok=True)
        context = tiny_runs.opened(tmp_path / folder, tiny_model, **sections)
        run = context.__enter__()
        stack.append(context)
        files.write_jsonl(run.stage_folder("label") / "comparisons.jsonl", ROWS)
        return run

    yield open_run
    for context in reversed(stack):
        context.__exit__(None, None, None)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return tiny_rewards.build_reward_model(tmp_path_factory.mktemp("foreign") / "model")


def plain_adapter(model, folder, task):
    torch.manual_seed(2)
    config = LoraConfig(task_type=task, r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def trained(run):
    return load_file(run.stage_folder("reward") / "adapter" / "adapter_model.safetensors")


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_adapter_of_plain_peft_with_a_head_is_where_training_starts(opened, tiny_model, tmp_path, heads):
    model = LlamaForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    start = plain_adapter(model, tmp_path / "plain", "SEQ_CLS")
    run = opened(reward={**STILL, "start_from": str(tmp_path / "plain"), "num_heads": heads})
    before = reward.inputs(run)
    reward.reward(run)
    found = trained(run)
    first, *others = found.pop(HEAD)
    assert [first.tolist()] == start.pop(HEAD).tolist()
    assert len(others) == heads - 1
    assert all((one - first).norm() / first.norm() == pytest.approx(0.3, abs=1e-5) for one in others)
    assert found.keys() == start.keys()
    assert all(torch.equal(found[name], start[name]) for name in start)
    (tmp_path / "plain" / "adapter_config.json").write_text("{}")
    assert reward.inputs(run)["start"] != before["start"]


@pytest.mark.parametrize("outputs", [1, 2])
def test_members_that_start_from_one_head_are_set_apart_and_those_that_differ_are_kept(
    opened, tiny_model, tmp_path, outputs
):
    model = LlamaForSequenceClassification.from_pretrained(tiny_model, num_labels=outputs)
    own = plain_adapter(model, tmp_path / "plain", "SEQ_CLS")[HEAD]
    run = opened(reward={"start_from": str(tmp_path / "plain"), "num_heads": 2, "num_adapters": 2})
    base = run.load_reward_base()
    members = []
    for place, role in enumerate(("reward", "reward-2")):
        torch.manual_seed(place)
        reward.add_starting_role(run, base, role)
        members += base.head_weight(role).tolist()
    assert members[:outputs] == own.tolist()
    assert len({tuple(one) for one in members}) == 4
    near = torch.nn.functional.cosine_similarity(torch.tensor(members), own[[0, -1, 0, -1]])
    assert near.min() > 0.9


@pytest.mark.slow
def test_an_adapter_of_a_causal_model_gets_a_new_head(opened, tiny_model, tmp_path):
    start = plain_adapter(LlamaForCausalLM.from_pretrained(tiny_model), tmp_path / "plain", "CAUSAL_LM")
    run = opened(reward={**STILL, "start_from": str(tmp_path / "plain")})
    reward.reward(run)
    found = trained(run)
    assert found.pop(HEAD).abs().sum() > 0
    assert all(torch.equal(found[name], start[name]) for name in start)


def test_an_adapter_with_another_number_of_outputs_than_asked_for_is_refused(opened, tiny_model, tmp_path):
    model = LlamaForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    plain_adapter(model, tmp_path / "plain", "SEQ_CLS")
    with pytest.raises(ModelError, match="its head has 3 outputs; 2 or 1 are expected"):
        reward.reward(opened(reward={**STILL, "start_from": str(tmp_path / "plain"), "num_heads": 2}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"start_from": "nowhere"}, "no adapter in `nowhere`"),
        ({"model": "some/model"}, "give `base` or an adapter"),
        ({"model_revision": "abc"}, "there is none"),
    ],
)
def test_a_start_that_cannot_be_is_refused_by_the_recipe(tmp_path, tiny_model, keys, message):
    path = tiny_runs.write_recipe(tmp_path / "tiny.yaml", tiny_model, reward=keys)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


# --- somebody else's reward model ------------------------------------------------------------------------------------


def plain_scores(folder, pairs):
    """What transformers alone says, with the model's own template and tokenizer."""
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt, answer in pairs:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        with torch.no_grad():
            found.append(model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits.item())
    return found


@pytest.mark.slow
def test_training_starts_at_the_scores_of_the_reward_model_itself_and_saves_an_adapter_for_it(opened, foreign):
    run = opened(reward={**STILL, "start_from": "base", "model": str(foreign)})
    reward.reward(run)
    folder = run.stage_folder("reward") / "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(foreign)
    base = run.load_reward_base()
    base.add_role("reward", adapter=folder)
    pairs = [("Hello?", "Good day."), ("Why?", "So.\n")]
    theirs = plain_scores(foreign, pairs)
    for (prompt, answer), expected in zip(pairs, theirs, strict=True):
        question = base.tokenizer.prompt([{"role": "user", "content": prompt}])
        with base.acting_as("reward"), torch.no_grad():
            own = score_groups(base, "reward", [Group(question, [base.tokenizer.response(answer)])])
        assert own.item() == pytest.approx(expected, abs=1e-5)
    assert abs(theirs[0] - theirs[1]) > 1e-3


@pytest.mark.slow
def test_training_moves_the_adapter_and_the_head_and_no_weight_of_the_reward_model(opened, foreign):
    before = {path.name: path.read_bytes() for path in foreign.iterdir()}
    run = opened(reward={"max_steps": 3, "start_from": "base", "model": str(foreign), "learning_rate": 1e-2})
    counts = reward.reward(run)
    assert counts["steps"] == 3
    weights = trained(run)
    assert any(name.endswith("lora_B.weight") and tensor.any() for name, tensor in weights.items())
    assert {path.name: path.read_bytes() for path in foreign.iterdir()} == before
    assert not any("score" in name and "lora" in name for name in weights)


@pytest.mark.parametrize("critic", [pytest.param("trunk", marks=pytest.mark.slow), "adapter"])
def test_ppo_scores_the_texts_and_not_the_ids_of_its_own_vocabulary(opened, foreign, critic):
    run = opened(
        reward={**STILL, "start_from": "base", "model": str(foreign)},
        ppo={"critic": critic},
        stages=["label", "reward", "ppo"],
    )
    reward.reward(run)
    actors = assign_roles(run)
    rows = [Prompt(id="a", prompt="Hello?"), Prompt(id="b", prompt="Why?")]
    responses = ["Good day.", "So."]
    tokenizer = actors.base.tokenizer
    ids = [tokenizer.prompt(row.messages) for row in rows]
    batch = sampling.pack(actors.base, ids, [tokenizer.response(text) for text in responses])
    theirs = plain_scores(foreign, [(row.prompt, text) for row, text in zip(rows, responses, strict=True)])
    assert score(actors, rows, responses, batch).total.tolist() == pytest.approx(theirs, abs=1e-5)
    other = encode_group(actors.model, rows[0].messages, [[{"role": "assistant", "content": responses[0]}]])
    assert other.prompt != ids[0]
    _, values = judge_tokens(actors, POLICY, batch)  # the critic stands on the policy's base, and starts at 0
    assert values.abs().max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": 2}, "out_features=2.*with one linear layer without a bias"),
        ({"template": None}, "no chat template"),
    ],
)
def test_a_model_that_gives_no_single_score_or_has_no_template_is_refused(tmp_path, change, message):
    folder = tiny_rewards.build_reward_model(tmp_path / "odd", **change)
    with pytest.raises(ModelError, match=message):
        SharedBase.load(ModelSection(model_name_or_path=str(folder)), classifier=True)


def test_a_causal_model_is_no_reward_model_of_its_own(tiny_model):
    with pytest.raises(ModelError, match=r"tensors of a sequence classification model are missing: score\.weight"):
        SharedBase.load(ModelSection(model_name_or_path=str(tiny_model)), classifier=True)
