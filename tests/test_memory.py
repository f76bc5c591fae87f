"""The memory model: every term against figures of an allocator, whole stages against their peaks, tables against it.

Fast tests check bytes that can be counted by hand. Slow ones let stages run on models of several shapes, and sum what
torch's allocator gives and takes back: that is exact, where the resident size of a process is not.
"""

import gc
import importlib
import json
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import tiny_runs
import torch
from conftest import build_tiny_model
from tiny_roles import load
from tiny_rows import comparison

from rlaif.decoders import Shape
from rlaif.memory import LOGITS_CHUNK, Held, Lengths, peak, phases
from rlaif.model import drawn
from rlaif.model.base import load_tokenizer
from rlaif.recipe import ModelSection, Recipe

ROOT = Path(__file__).resolve().parents[1]
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
WIDE = (3, 128, 384, 4, 2, 3000)  # layers, hidden, intermediate, heads, key heads, vocabulary
NARROW = (4, 64, 128, 4, 4, 1000)
ONE_LAYER = 0.02  # of what layers keep: masks, positions and chosen states, which the model leaves out
WHOLE = 0.2  # of a stage's peak
SAID, TEXT = "p" * 60, "x" * 180


def shape():
    found = Shape.of(LLAMA)
    assert found is not None
    return found


def held(*, cuda=True, **settings):
    return Held(shape(), ModelSection(model_name_or_path="x", **settings), cuda)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_the_parameters_of_an_8b_model_are_those_that_its_authors_give():
    assert shape().parameters == pytest.approx(8.03e9, rel=1e-3)
    assert shape()._replace(tied=True).parameters == pytest.approx(8.03e9 - 128256 * 4096, rel=1e-3)


def test_a_model_of_another_kind_has_no_shape():
    assert Shape.of({**LLAMA, "model_type": "mixtral"}) is None
    assert Shape.of({"model_type": "gpt2", "n_embd": 768}) is None
    assert Shape.of({"model_type": "llava", "text_config": LLAMA}) == shape()


def test_weights_take_their_bits_and_their_scales():
    inner, outer = 32 * 218_103_808, 2 * 128256 * 4096 + 65 * 4096
    assert held().weights == 2 * (inner + outer)
    assert held(cuda=False).weights == 4 * (inner + outer)
    assert held(load_in_4bit=True, use_bnb_nested_quant=False).weights == inner * (0.5 + 4 / 64) + 2 * outer
    assert held(load_in_4bit=True).weights == inner * (0.5 + 1 / 64 + 4 / 16384) + 2 * outer
    rows = 32 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096)
    assert held(load_in_8bit=True).weights == inner + 4 * rows + 2 * outer


def test_an_adapter_has_two_thin_matrices_for_each_that_it_changes():
    assert held(lora_r=16).adapter == 41_943_040  # as PEFT counts them for Llama 3.1 8B
    assert held(lora_r=16, lora_target_modules=["q_proj", "v_proj"]).adapter == 6_815_744


def test_the_cache_is_two_vectors_for_each_layer_and_token():
    assert held().cache(1, 1) == 131_072  # 128 KiB a token in bf16, the figure that is known of this model
    assert held(cuda=False).cache(3, 5) == 15 * 262_144


def test_recomputation_keeps_one_vector_of_each_layer():
    plain, logits = held().learning(100, 0.0)
    less, _ = held(gradient_checkpointing=True).learning(100, 0.0)
    layer = held().layer()
    assert logits == 0.0
    assert plain - less == 100 * (32 * layer - 32 * 2 * 4096 - layer)


def test_logits_count_where_they_are_more_than_a_layers_backward_pass():
    few, none = held(gradient_checkpointing=True).learning(10, 1.0)
    kept, all_ = held(gradient_checkpointing=True).learning(10, 1e9)
    assert (none, all_) == (0.0, 1e9)
    assert few - kept == 10 * (held().layer() + 8 * 14336)


def recipe(**sections):
    return Recipe.model_validate({"name": "m", "model": {"model_name_or_path": "x", "load_in_4bit": True}, **sections})


def test_the_roles_of_ppo_are_counted():
    parts = [{"name": "score", "model": True}, {"name": "harm", "cost": "reward"}]
    both = recipe(reward={"cost": True, "num_adapters": 2}, ppo={"rewards": parts, "critic": "adapter"})
    one = held(load_in_4bit=True)
    found = phases("ppo", both, Lengths(512), one)
    assert {round(phase.adapters / (4 * one.adapter)) for phase in found} == {
        6
    }  # policy, reference, critic, 2 rewards, cost
    assert {phase.optimizer for phase in found} == {12 * 2 * one.adapter}
    alone = recipe(stages=["ppo"], ppo={"reward_function": "brief", "critic": "trunk"})
    assert {phase.adapters for phase in phases("ppo", alone, Lengths(512), one)} == {4 * one.adapter}


def roles_of(one, **ppo):
    """How many adapters PPO has, and how many of them learn."""
    found = phases("ppo", recipe(reward={"cost": True, "num_heads": 2}, ppo=ppo), Lengths(512), one)[0]
    return found.adapters / (4 * one.adapter), found.optimizer / (12 * one.adapter)


def test_a_constraint_brings_its_critic_and_where_an_adapter_says_the_cost_that_one():
    one, limit = held(load_in_4bit=True), {"cost": "reward"}
    assert roles_of(one, critic="adapter") == (4, 2)  # policy, reference, critic, reward
    assert roles_of(one, critic="adapter", constraint=limit) == (6, 3)
    assert roles_of(one, critic="adapter", constraint={"function": "f"}) == (5, 3)
    assert roles_of(one, critic="trunk", constraint=limit) == (4, 1)
    assert roles_of(one, advantage_estimator="reinforce", constraint=limit) == (4, 1)


def test_an_independent_score_brings_what_gives_it_and_nothing_twice():
    one, function = held(load_in_4bit=True), {"critic": "trunk", "reward_function": "f"}
    model, cost = {"name": "m", "model": True}, {"name": "c", "cost": "reward"}
    assert roles_of(one, **function) == (2, 1)
    assert roles_of(one, **function, independent=[model, cost]) == (4, 1)
    assert roles_of(one, critic="trunk", independent=[{"name": "two", "member": 2}]) == (3, 1)


def test_logits_of_ppo_are_those_of_a_chunk_however_many_responses_are_learned_from():
    assert LOGITS_CHUNK == drawn._CHUNK
    assert held(cuda=False).drawn(100, entropy=False) == 12 * 100 * 128256
    assert held(cuda=False).drawn(1000, entropy=True) == 16 * 256 * 128256
    assert held().drawn(1000, entropy=False) == 14 * 256 * 128256  # bf16: the projection as well


def test_fewer_responses_sampled_at_a_time_need_less_for_keys_and_values():
    one = held(load_in_4bit=True)
    whole, half = (
        phases(
            "ppo", recipe(ppo={"rollout_batch": 16, "samples_per_prompt": 2, "sampling_batch": rows}), Lengths(512), one
        )
        for rows in (None, 16)
    )
    assert (whole[0].phase, half[0].phase) == ("sampling", "sampling")
    assert whole[0].cache == 2 * half[0].cache and whole[1:] == half[1:]


def test_where_a_server_samples_ppo_has_no_phase_of_sampling_here():
    here, there = (
        phases("ppo", recipe(ppo={"sampling_engine": name}), Lengths(512), held()) for name in ("base", "fast")
    )
    assert [one.phase for one in here] == ["sampling", "scoring", "updating"] and there == here[1:]


def test_a_reward_model_of_somebody_else_is_a_second_base():
    other = recipe(reward={"model": "y", "start_from": "base"})
    one = held(load_in_4bit=True)
    assert peak("ppo", other, Lengths(512), one, one).weights == 2 * one.weights
    assert peak("sft", other, Lengths(512, 512), one, one).weights == one.weights


def test_plain_text_is_a_phase_of_its_own():
    text = recipe(ppo={"ptx_coef": 1.0, "ptx_file": "t.txt", "ptx_length": 4096, "microbatch": 8, "minibatch": 8})
    assert peak("ppo", text, Lengths(64), held(load_in_4bit=True)).phase == "learning text"
    text.ppo.ptx_coef = 0.0
    found = peak("ppo", text, Lengths(64), held(load_in_4bit=True))
    assert (found.phase, found.logits) == ("reading text", 8 * 8 * 4096 * shape().vocabulary)
    text.ppo.ptx_heldout = 0
    assert peak("ppo", text, Lengths(64), held(load_in_4bit=True)).phase != "reading text"


@pytest.mark.parametrize("stage", ["revise", "sft", "label", "reward", "ppo", "dpo", "rejection", "evaluate"])
def test_more_rows_at_a_time_never_take_less(stage):
    key = {"ppo": "microbatch", "sft": "per_device_train_batch_size"}.get(stage)
    key = key or ("per_device_train_batch_size" if stage in ("reward", "dpo") else "batch_size")
    stages = ["revise", "sft", "label", "reward", "ppo", "dpo", "rejection", "evaluate"]
    totals = [
        peak(stage, recipe(stages=stages, **{stage: {key: rows}}), Lengths(512, 512), held(load_in_4bit=True)).total
        for rows in (1, 2, 4, 8, 16)
    ]
    assert totals == sorted(totals)
    assert totals[0] < totals[-1] or stage in ("rejection", "evaluate")  # whose other phases may be the larger ones


def test_the_tables_of_the_page_are_what_the_model_says():
    path = ROOT / "scripts" / "bench" / "memory"
    loader = SourceFileLoader("bench_memory", str(path))
    spec = spec_from_loader("bench_memory", loader)
    assert spec is not None
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        loader.exec_module(module)
    assert module.tables() in (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")


# --- by measurement ---------------------------------------------------------------------------------------------------


def build(folder, layers, hidden, intermediate, heads, kv_heads, vocabulary):
    """Write a random model of a shape, with the tiny model's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    build_tiny_model(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=16384,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def model_of(folder, settings):
    found = Shape.of(json.loads((folder / "config.json").read_text()))
    assert found is not None
    return Held(found, settings, cuda=False)


def measured_peak(run):
    """The most bytes of tensors that were there at once while something ran, beyond those that were there before."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = top = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_what_layers_keep_for_a_backward_pass_is_counted(tmp_path, monkeypatch, dtype, four_bit, packed):
    from rlaif.model import sampling

    monkeypatch.setattr("rlaif.model.base.compute_dtype", lambda name, device: getattr(torch, dtype))
    folder = build(tmp_path / "model", *WIDE)
    base = load(folder, load_in_4bit=four_bit)
    base.add_role("policy", trainable=True)
    settings = ModelSection(model_name_or_path="x", load_in_4bit=four_bit, dtype=dtype, lora_r=4)
    model = model_of(folder, settings)
    batch = sampling.pack(base, [list(range(n, n + 40)) for n in (3, 4, 5)], [list(range(3, 33))] * 3)
    own = {one.untyped_storage().data_ptr() for one in [*base.lm.parameters(), *base.lm.buffers()]}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with base.acting_as("policy", training=True), torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        drawn.token_states(base, batch) if packed else sampling.hidden_states(base, batch)
    size = sum(one.untyped_storage().nbytes() for place, one in kept.items() if place not in own)
    last = 4 * 128  # the last norm's input
    tokens = 3 * (69 if packed else 70)  # nothing is drawn after the last one
    assert size / tokens == pytest.approx(3 * model.layer(packed=packed) + last, rel=ONE_LAYER)


@pytest.mark.slow
@pytest.mark.parametrize("four_bit", [False, True])
def test_weights_and_adapters_in_memory_are_counted(tmp_path, four_bit):
    folder = build(tmp_path / "model", *WIDE)
    base = load(folder, load_in_4bit=four_bit)
    for role in ("policy", "reference"):
        base.add_role(role)
    there = {}
    for parameter in base.lm.parameters():
        tensors = [parameter]
        if four_bit and hasattr(parameter, "quant_state"):
            tensors += [parameter.quant_state.absmax, parameter.quant_state.state2.absmax]
        there |= {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    model = model_of(folder, ModelSection(model_name_or_path="x", load_in_4bit=four_bit, lora_r=4))
    assert model.weights + 2 * 4 * model.adapter == pytest.approx(sum(there.values()), rel=1e-3)


def prepared(run):
    """Write what stages read, rows of one length; return an answer of it."""
    answers = [[{"role": "assistant", "content": f"{n} {TEXT}"}] for n in range(10)]
    demonstrations = [
        {"id": f"d{n}", "prompt": question(n, SAID), "completion": answer, "messages": [*question(n, SAID), *answer]}
        | {"revisions": [], "flags": [], "provenance": {}}
        for n, answer in enumerate(answers)
    ]
    rows = [comparison(n, f"a{n} {TEXT}", f"b{n} {TEXT}", prompt=f"{n} {SAID}").model_dump() for n in range(16)]
    for stage, name, found in (("revise", "demonstrations", demonstrations), ("label", "comparisons", rows)):
        run.stage_folder(stage).mkdir(parents=True)
        path = run.stage_folder(stage) / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
        tiny_runs.finished(run.stage_folder(stage))
    return f"10 {TEXT}"


def question(number, said):
    return [{"role": "user", "content": f"{number} {said}"}]


STEPS = {"max_steps": 2, "per_device_train_batch_size": 2}
CASES = {
    "sft": (WIDE, {"sft": STEPS}),
    "sft, recomputed": (NARROW, {"model": {"gradient_checkpointing": True}, "sft": STEPS}),
    "reward": (WIDE, {"reward": {**STEPS, "allow_weak_reward": True}}),
    "dpo": (WIDE, {"dpo": STEPS}),
    "ppo, trunk": (WIDE, {"ppo": {"critic": "trunk", "microbatch": 4, "sampling": {"max_new_tokens": 40}}}),
    "ppo, adapter, recomputed, 4 bits": (
        WIDE,
        {
            "model": {"gradient_checkpointing": True, "load_in_4bit": True},
            "ppo": {"critic": "adapter", "microbatch": 4, "sampling": {"max_new_tokens": 40, "temperature": 0.7}},
        },
    ),
    "ppo, narrow, two critics, recomputed, 4 bits": (
        NARROW,
        {
            "model": {"gradient_checkpointing": True, "load_in_4bit": True},
            "ppo": {
                "critic": "adapter",
                "constraint": {"function": "brief"},
                "microbatch": 4,
                "sampling": {"max_new_tokens": 40},
            },
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_a_stage_is_what_the_model_says(tmp_path, monkeypatch, no_sync, one_thread, case):
    stage = case.partition(",")[0]
    size, changes = CASES[case]
    folder = build(tmp_path / "model", *size)
    if stage == "ppo":
        changes = changes | {"ppo": {"updates": 1, "rollout_batch": 8, "minibatch": 8, **changes["ppo"]}}
    last = {"sft": ["reward"], "ppo": ["reward", "ppo"]}.get(stage, [stage])
    with tiny_runs.opened(tmp_path, folder, stages=["revise", "sft", "label", *last], **changes) as run:
        answer = prepared(run)
        if stage != "sft":
            tiny_runs.with_sft(run)
        if stage == "ppo":
            tiny_runs.with_reward(run)
        tokenizer = load_tokenizer(str(folder))
        row = len(tokenizer.prompt(question(10, SAID))) + len(tokenizer.response(answer))
        prompts = run.select("train", run.recipe.ppo.prompts_per_tag)
        prompt = max(len(tokenizer.prompt(one.messages)) for one in prompts)
        weights = 0.0
        if run.recipe.model.load_in_4bit:  # what it is made of while it loads would count as if it stayed
            base, weights = run.load_base(), model_of(folder, run.recipe.model).weights
            monkeypatch.setattr(type(run), "load_base", lambda run: base)
        module = importlib.import_module(f"rlaif.stages.{stage}")
        found = measured_peak(lambda: getattr(module, stage)(run))
        model = peak(stage, run.recipe, Lengths(prompt, row), model_of(folder, run.recipe.model))
    assert model.total - model.process == pytest.approx(weights + found, rel=WHOLE)
