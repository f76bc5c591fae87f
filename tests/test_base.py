import contextlib
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_roles import load, logits_of
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlaif.errors import DeviceError, ModelError
from rlaif.model import base as base_module
from rlaif.model.base import compute_dtype, load_base
from rlaif.model.roles import BASE
from rlaif.recipe import ModelSection

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def settings(folder, **keys):
    return ModelSection(model_name_or_path=str(folder), **keys)


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def change(folder, name="config.json", **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# --- what is loaded ------------------------------------------------------------------------------------------------


def test_a_base_is_frozen_in_evaluation_mode_and_fp32_on_a_cpu(tiny_model):
    base = load_base(settings(tiny_model))
    assert not base.lm.training
    assert not any(parameter.requires_grad for parameter in base.lm.parameters())
    assert {parameter.dtype for parameter in base.lm.parameters()} == {torch.float32}
    assert (base.device, base.max_length, base.tokenizer.eos_ids) == (CPU, 16384, [2])


def test_four_bits_quantize_every_projection_and_nothing_else(tiny_model_64):
    base = load_base(settings(tiny_model_64, load_in_4bit=True))
    packed = {name for name, parameter in base.lm.named_parameters() if parameter.dtype == torch.uint8}
    assert len(packed) == 14 and all("_proj.weight" in name for name in packed)
    others = {parameter.dtype for name, parameter in base.lm.named_parameters() if name not in packed}
    assert others == {torch.float32}


def test_all_ends_of_a_response_are_known(folder):
    change(folder, "generation_config.json", eos_token_id=[2, 7])
    assert load_base(settings(folder)).tokenizer.eos_ids == [2, 7]
    change(folder, "generation_config.json", eos_token_id=7)
    assert load_base(settings(folder)).tokenizer.eos_ids == [2, 7]


def test_dropout_of_a_models_configuration_is_off_in_training_mode(tiny_model, folder):
    change(folder, attention_dropout=0.5)
    found = logits_of(load(folder), BASE, training=True)
    torch.testing.assert_close(found, logits_of(load(tiny_model), BASE), rtol=0, atol=0)


SMALL = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, **LAYERS, tie_word_embeddings=True)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, **LAYERS, head_dim=8, final_logit_softcapping=0.5)),
}


def save_beside(model, folder):
    """Replace the tiny model's weights by another family's."""
    (folder / "model.safetensors").unlink()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    model.save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_of_models_take_part(folder, family):
    torch.manual_seed(0)
    save_beside(FAMILIES[family](), folder)
    base = load(folder, attn_implementation="eager" if family == "gemma2" else "sdpa")
    alone = logits_of(base, BASE)
    base.add_role("policy", trainable=True)
    torch.testing.assert_close(logits_of(base, "policy"), alone, rtol=0, atol=0)
    base.save_role("policy", folder / "adapter")
    base.add_role("again", adapter=folder / "adapter")
    torch.testing.assert_close(logits_of(base, "again", training=True), alone, rtol=0, atol=0)


def test_a_family_without_sdpa_is_told_what_to_set(folder):
    save_beside(FAMILIES["gemma2"](), folder)
    with pytest.raises(ModelError, match="Try `model.attn_implementation: eager`"):
        load(folder)


def test_a_family_whose_logits_are_scaled_is_refused(folder):
    torch.manual_seed(0)
    save_beside(GraniteForCausalLM(GraniteConfig(**SMALL, **LAYERS, logits_scaling=8.0)), folder)
    with pytest.raises(ModelError, match="not a projection of its last hidden state.*`granite` is not supported"):
        load(folder)


# --- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_a_cpu_is_refused(tiny_model, dtype):
    with pytest.raises(DeviceError, match=f"model.dtype: `{dtype}` on a CPU .* use `auto`"):
        compute_dtype(dtype, CPU)
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError):
            load_base(settings(tiny_model, dtype=dtype))


def test_auto_is_fp32_on_a_cpu_and_bf16_on_a_gpu():
    assert compute_dtype("auto", CPU) == compute_dtype("float32", CPU) == torch.float32
    assert compute_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert compute_dtype("float16", torch.device("cuda")) == torch.float16


# --- folders that cannot be used -----------------------------------------------------------------------------------


def to_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def to_classifier(folder):
    config = LlamaForCausalLM.from_pretrained(folder).config
    (folder / "model.safetensors").unlink()
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder)


DAMAGE = {
    "an empty folder": (lambda f: [file.unlink() for file in f.iterdir()], "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "weights as a pickle only": (to_pickle, "model.safetensors"),
    "weights cut short": (cut_short, "cannot be loaded"),
    "a tensor missing": (
        lambda f: change_weights(f, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
        "1 tensors of a causal language model are missing: model.layers.1.mlp.up_proj.weight",
    ),
    "a tensor of another shape": (
        lambda f: change_weights(f, lambda w: w.update({"model.norm.weight": torch.ones(5)})),
        "cannot be loaded",
    ),
    "a classifier": (to_classifier, "are missing: lm_head.weight"),
    "an unknown kind": (lambda f: change(f, model_type="unheard-of"), "unheard-of"),
    "no kind": (lambda f: (f / "config.json").write_text("{}"), "model_type"),
    "a broken configuration": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "a configuration of another type": (lambda f: (f / "config.json").write_text("[]"), "cannot be loaded"),
    "a wrong value": (lambda f: change(f, hidden_size="wide"), "hidden_size.*expected int"),
    "a quantization that needs another package": (
        lambda f: change(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "(?i)gptq",
    ),
    "no tokenizer": (lambda f: [file.unlink() for file in f.glob("token*")], "cannot be loaded"),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"model": 3}'), "cannot be loaded|tokenizer"),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_folder_that_is_no_model_gives_one_message(folder, damage):
    damage[0](folder)
    with pytest.raises(ModelError, match=damage[1]) as refused:
        load_base(settings(folder))
    message = str(refused.value)
    assert message.startswith(f"model `{folder}`: ") and "\n" not in message and len(message) < 700


@pytest.mark.slow  # the message of transformers lists every model it knows
def test_an_image_model_gives_one_message(folder):
    change(folder, model_type="vit")
    with pytest.raises(ModelError, match="ViTConfig"):
        load_base(settings(folder))


@pytest.mark.parametrize("name", ["no-such-model", "./missing/folder", "nobody/nothing", "smollm2-135", "a b/c?"])
def test_a_model_that_does_not_exist_gives_one_message(name):
    with pytest.raises(ModelError) as refused:
        load_base(settings(name))
    message = str(refused.value)
    assert message.startswith(f"model `{name}`: cannot be loaded: ") and "\n" not in message
    assert message.endswith(
        "Expected: an embedded model (smollm2-135m), a folder with a model in the Hugging Face format (safetensors), "
        "or the id of one on the Hub."
    )


# --- no code comes with a model ------------------------------------------------------------------------------------

CANARY = """
from pathlib import Path
Path("ran").touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): pass
class Model(LlamaForCausalLM): pass
class Tok(PreTrainedTokenizerFast): pass
"""
CLASSES = {"AutoConfig": "canary.Config", "AutoModelForCausalLM": "canary.Model", "AutoTokenizer": [None, "canary.Tok"]}


@pytest.fixture
def with_code(folder, tmp_path, monkeypatch):
    """A model's folder with Python files that leave a mark when they run; transformers caches them under this test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    (folder / "canary.py").write_text(CANARY)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CANARY)
    change(folder, auto_map=CLASSES, trust_remote_code=True)
    change(folder, "tokenizer_config.json", auto_map=CLASSES, trust_remote_code=True)
    return folder


def ran(tmp_path):
    return list(tmp_path.rglob("ran"))


def test_the_canary_sings(with_code, tmp_path):
    from transformers import AutoConfig

    AutoConfig.from_pretrained(with_code, trust_remote_code=True)
    assert ran(tmp_path)


def test_code_in_the_folder_of_a_known_kind_of_model_does_not_run(with_code, tiny_model, tmp_path):
    base = load(with_code)
    assert type(base.lm) is LlamaForCausalLM
    torch.testing.assert_close(logits_of(base, BASE), logits_of(load(tiny_model), BASE), rtol=0, atol=0)
    assert not ran(tmp_path)


@pytest.mark.parametrize("kind", [{"model_type": "unheard-of"}, {"model_type": "llava", "text_config": {}}])
def test_code_in_the_folder_of_an_unknown_kind_of_model_does_not_run(with_code, tmp_path, kind):
    change(with_code, **kind)
    with pytest.raises(ModelError):
        load_base(settings(with_code))
    assert not ran(tmp_path)


def test_a_tokenizer_class_in_the_folder_does_not_run(with_code, tmp_path):
    change(with_code, "tokenizer_config.json", tokenizer_class="Tok")
    with contextlib.suppress(ModelError):
        load_base(settings(with_code))
    assert not ran(tmp_path)


def test_a_configuration_cannot_choose_the_attention_kernel(folder):
    change(folder, _attn_implementation_internal="someone/kernel", _attn_implementation="someone/kernel")
    assert load(folder).lm.config._attn_implementation == "sdpa"


# --- identity ------------------------------------------------------------------------------------------------------


def identity(folder, **keys):
    return load_base(settings(folder, **keys)).identity


CHANGES = {
    "one weight": lambda f: change_weights(f, lambda w: w["model.norm.weight"].mul_(1.01)),
    "the template": lambda f: (f / "chat_template.jinja").write_text(
        (f / "chat_template.jinja").read_text().replace("assistant", "model")
    ),
    "the template in its older place": lambda f: change(
        f, "tokenizer_config.json", chat_template=(f / "chat_template.jinja").read_text() + "\n"
    ),
    "the ends of a response": lambda f: change(f, "generation_config.json", eos_token_id=[2, 7]),
    "the configuration": lambda f: change(f, rms_norm_eps=1e-3),
}


@pytest.mark.parametrize("edit", CHANGES.values(), ids=CHANGES.keys())
def test_identity_changes_with_what_an_answer_depends_on(folder, edit):
    before = identity(folder)
    assert identity(folder) == before
    edit(folder)
    assert identity(folder) != before


def test_identity_names_the_precision(tiny_model_64):
    kinds = [
        {},
        {"load_in_4bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_4bit": True, "use_bnb_nested_quant": False},
    ]
    identities = [identity(tiny_model_64, **keys) for keys in kinds]
    assert len({json.dumps(one) for one in identities}) == 4
    assert identities[0]["dtype"] == "torch.float32"
    assert identity(tiny_model_64, bnb_4bit_quant_type="fp4") == identities[0]  # without 4 bits it means nothing


def test_identity_of_large_files_looks_all_over_them(folder, monkeypatch):
    monkeypatch.setattr(base_module, "_HASHED_WHOLE", 1000)
    monkeypatch.setattr(base_module, "_SAMPLE", 64)
    stamps = {json.dumps(identity(folder)["weights"])}
    for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        change_weights(folder, lambda w, name=name: w[name].mul_(1.5))
        stamps.add(json.dumps(identity(folder)["weights"]))
    assert len(stamps) == 4
    assert all("-" in stamp for stamp in [identity(folder)["weights"]["model.safetensors"]])


def test_saved_tokenizers_load_as_they_were(tiny_model, tmp_path):
    base = load_base(settings(tiny_model))
    base.tokenizer.raw.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("a<|end|>b")["input_ids"] == base.tokenizer.raw("a<|end|>b")["input_ids"]
    assert again.chat_template == base.tokenizer.raw.chat_template
