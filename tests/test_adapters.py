import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_roles import PROMPTS, RESPONSES, ROUNDING, add_stirred, batch_of, digests, load, logits_of, scores_of
from transformers import LlamaForCausalLM

from rlaif.errors import ModelError
from rlaif.model import sampling
from rlaif.model.roles import BASE, SharedBase
from rlaif.recipe import ModelSection

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[False, True], ids=["fp32", "nf4"])
def four_bit(request):
    return request.param


@pytest.fixture
def folder(four_bit, tiny_model, tiny_model_64):
    return tiny_model_64 if four_bit else tiny_model


@pytest.fixture
def base(folder, four_bit):
    return load(folder, load_in_4bit=four_bit)


# --- adapter folders -----------------------------------------------------------------------------------------------


def test_a_saved_role_loads_as_it_was(base, tmp_path):
    add_stirred(base, "reward", 1, trainable=True, head=True)
    base.save_role("reward", tmp_path / "adapter")
    base.add_role("again", adapter=tmp_path / "adapter")
    torch.testing.assert_close(logits_of(base, "again"), logits_of(base, "reward"), rtol=0, atol=0)
    torch.testing.assert_close(scores_of(base, "again"), scores_of(base, "reward"), rtol=0, atol=0)
    assert scores_of(base, "again").abs().min() > 0


def test_saved_folders_hold_no_pickle_and_say_where_their_base_is(base, folder, tmp_path):
    base.add_role("policy", trainable=True)
    base.add_role("reward", head=True)
    for role, task, modules in (("policy", "CAUSAL_LM", None), ("reward", "SEQ_CLS", ["score"])):
        base.save_role(role, tmp_path / role)
        assert not list((tmp_path / role).glob("*.bin"))
        config = json.loads((tmp_path / role / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(folder)
        assert (config["task_type"], config["modules_to_save"], config["inference_mode"]) == (task, modules, True)
    heads = load_file(tmp_path / "reward" / "adapter_model.safetensors")
    assert heads["base_model.model.score.weight"].dtype == torch.float32


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    base = load(tiny_model)
    add_stirred(base, "policy", 1, head=True)
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    base.save_role("policy", folder)
    return folder


@pytest.fixture
def adapter(saved, tmp_path):
    """A copy of a saved adapter with a head that a test may damage."""
    return shutil.copytree(saved, tmp_path / "adapter")


def change_config(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


def change_weights(folder, change):
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")


LAST = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
DAMAGE = {
    "a tensor is missing": (lambda f: change_weights(f, lambda w: w.pop(LAST)), "v_proj.lora_B.weight.*absent"),
    "a tensor of another model": (
        lambda f: change_weights(f, lambda w: w.update({"base_model.model.lm_head.weight": torch.ones(3, 3)})),
        r"1 tensors differ; base_model.model.lm_head.weight has the shape \[3, 3\]; absent is expected",
    ),
    "another width": (
        lambda f: change_weights(f, lambda w: w.update({LAST: torch.ones(5, 4)})),
        r"\[5, 4\]; \[16, 4\] is expected",
    ),
    "another rank": (lambda f: change_config(f, r=8), "28 tensors differ"),
    "a head of another width": (
        lambda f: change_weights(f, lambda w: w.update({"base_model.model.score.weight": torch.ones(2, 31)})),
        r"head has the shape \[2, 31\]; \[outputs, 32\] is expected",
    ),
    "unknown modules": (lambda f: change_config(f, target_modules=["c_attn"]), "c_attn"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "not a LoRA adapter folder"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "not a LoRA adapter folder"),
    "weights cut short": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-50]),
        "not a LoRA adapter folder",
    ),
    "broken JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not a LoRA adapter folder"),
    "JSON of another kind": (lambda f: (f / "adapter_config.json").write_text("[]"), "not a LoRA adapter folder"),
    "another method": (lambda f: change_config(f, peft_type="IA3"), "a plain LoRA adapter is expected"),
    "DoRA": (lambda f: change_config(f, use_dora=True), "a plain LoRA adapter is expected"),
    "biases": (lambda f: change_config(f, bias="all"), "a plain LoRA adapter is expected"),
    "a start that changes the base": (lambda f: change_config(f, init_lora_weights="pissa"), "pissa"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_nothing(tiny_model, adapter, damage):
    base = load(tiny_model)
    alone = digests(base)
    damage[0](adapter)
    with pytest.raises(ModelError, match=damage[1]) as refused:
        base.add_role("policy", adapter=adapter)
    assert "adapter" in str(refused.value).splitlines()[0]
    assert not list(base.heads)
    base.add_role("policy", trainable=True)  # the name is free still
    torch.testing.assert_close(logits_of(base, "policy"), logits_of(base, BASE), rtol=0, atol=0)
    kept = {name.replace(".base_layer", ""): digest for name, digest in digests(base).items() if "lora_" not in name}
    assert kept == alone


def test_an_adapter_that_holds_nan_is_refused_with_the_tensor(tiny_model, tmp_path):
    base = load(tiny_model)
    add_stirred(base, "reward", 1, trainable=True)
    base.save_role("reward", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[3]
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(ModelError, match=f"1 of {len(tensors)} tensors hold numbers that are not finite, `{name}`"):
        base.add_role("again", adapter=tmp_path / "adapter")


def test_wrong_target_modules_of_a_recipe_are_named(tiny_model):
    base = SharedBase.load(ModelSection(model_name_or_path=str(tiny_model), lora_target_modules=["c_attn"]))
    with pytest.raises(ModelError, match="model.lora_target_modules.*c_attn"):
        base.add_role("policy")


def test_an_adapter_made_by_peft_alone_loads_without_its_dropout(tiny_model, tmp_path):
    torch.manual_seed(3)
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.5, target_modules=["q_proj", "down_proj"], use_rslora=True)
    peft = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model), config)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(tmp_path / "adapter")
    base = load(tiny_model)
    base.add_role("policy", adapter=tmp_path / "adapter", trainable=True)
    batch = batch_of(base)
    with torch.no_grad():
        plain = peft.eval()(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions).logits
        with base.acting_as("policy", training=True):
            ours = base.logits(sampling.hidden_states(base, batch))
    torch.testing.assert_close(ours[batch.mask.bool()], plain[batch.mask.bool()], rtol=0, atol=1e-5)


# --- loading without this package ----------------------------------------------------------------------------------

LOADING = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer, BitsAndBytesConfig

folder, four_bit, batches = sys.argv[1], sys.argv[2] == "True", json.loads(sys.argv[3])
keys = {"dtype": torch.float32}
if four_bit:
    keys["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
pad = AutoTokenizer.from_pretrained(folder + "/policy").pad_token_id
policy = AutoPeftModelForCausalLM.from_pretrained(folder + "/policy", **keys).eval()
reward = AutoPeftModelForSequenceClassification.from_pretrained(folder + "/reward", num_labels=1, **keys).eval()
for module in (*policy.modules(), *reward.modules()):
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False  # compute in fp32 on every CPU, so that results can be compared
answer = {"logits": [], "scores": []}
for rows in batches:
    width = max(map(len, rows))
    for left in (False, True):
        gaps = [[pad] * (width - len(row)) for row in rows]
        ids = torch.tensor([gap + row if left else row + gap for gap, row in zip(gaps, rows)])
        mask = (ids != pad).long()
        with torch.no_grad():
            logits = policy(input_ids=ids, attention_mask=mask).logits
            answer["scores"].append(reward(input_ids=ids, attention_mask=mask).logits[:, 0].tolist())
        last = [width - 1 if left else len(row) - 1 for row in rows]
        answer["logits"].append([logits[i, at].tolist() for i, at in enumerate(last)])
print(json.dumps(answer))
"""


@pytest.mark.slow
def test_saved_adapters_load_in_a_fresh_process_without_this_package(base, four_bit, tmp_path):
    add_stirred(base, "policy", 1, trainable=True)
    add_stirred(base, "reward", 2, head=True)
    for role in ("policy", "reward"):
        base.save_role(role, tmp_path / role)
    rows = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    batches = [rows, rows[:1], rows[1:2], rows[2:]]
    command = [sys.executable, "-c", LOADING, str(tmp_path), str(four_bit), json.dumps(batches)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    for index, batch in enumerate(batches):
        packed = sampling.pack(base, batch, [[] for _ in batch])
        with torch.no_grad(), base.acting_as("policy"):
            expected = base.logits(sampling.last_hidden(packed, sampling.hidden_states(base, packed)))
        with torch.no_grad(), base.acting_as("reward"):
            scores = sampling.scores(base, "reward", packed)
        assert scores.abs().min() > 0.01
        for side in (2 * index, 2 * index + 1):
            torch.testing.assert_close(torch.tensor(answer["logits"][side]), expected, **ROUNDING)
            torch.testing.assert_close(torch.tensor(answer["scores"][side]), scores, **ROUNDING)
