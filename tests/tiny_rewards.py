"""Trained and foreign reward models for tests: a finished run folder, and a tiny reward model with its own words."""

import json

import tiny_runs

OTHER_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}<eot>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def build_reward_model(folder, *, seed=5, labels=1, template=OTHER_TEMPLATE):
    """Write a Llama with a score head, whose vocabulary is in another order and whose template is another one."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    tokens = [*alphabet, "<none>", "<bos>", "<eot>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eot>", pad_token="<none>")
    fast.chat_template = template
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=tokens.index("<none>"),
        num_labels=labels,
        initializer_range=0.2,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def finished(folder, model, *, heads=1, adapters=1, cost=False):
    """A run folder whose reward stage holds adapters of random weights, measured as if: offsets 1, 2, ..., scale 2."""
    import torch

    with tiny_runs.opened(folder, model) as run:
        stage = run.stage_folder("reward")
        base = run.load_base()
        names = ["reward", *(f"reward-{number}" for number in range(2, adapters + 1)), *(["cost"] if cost else [])]
        for number, name in enumerate(names):
            base.add_role(name, trainable=True, head=True, outputs=1 if name == "cost" else heads)
            generator = torch.Generator().manual_seed(number)
            for _, parameter in base.named_parameters_of(name):
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            base.save_role(name, (stage if name == "reward" else stage / name) / "adapter")
        members = [{"offset": float(one + 1), "scale": 2.0} for one in range(heads * adapters)]
        (stage / "calibration.json").write_text(json.dumps({"members": members}))
        if cost:
            own = {"members": [{"offset": 0.0, "scale": 4.0}]}
            (stage / "cost" / "calibration.json").write_text(json.dumps(own))
        (folder / "tiny.yaml").rename(folder / "recipe.yaml")
    return folder
