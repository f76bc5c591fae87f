"""Model cards: the ``README.md`` of an adapter folder, as the Hub expects one.

A card says what the stage has measured and how to load the adapter, and depends on nothing else: no dates and no paths
of the run, so that equal runs write equal cards. The licence is left to who publishes the adapter.
"""

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rlaif import files
from rlaif.model import builtin
from rlaif.model.base import compute_dtype, default_device
from rlaif.model.roles import SharedBase
from rlaif.recipe import ModelSection
from rlaif.stages.run import Run

NAME = "README.md"
_PACKAGES = ("rlaif-toolkit", "torch", "transformers", "peft", "bitsandbytes")
_QUESTION = '[{"role": "user", "content": "How long do eggs boil?"}'


def write_reward_card(
    run: Run, base: SharedBase, folder: Path, heads: int, measured: dict[str, Any], rows: Iterable[Any]
) -> None:
    """Write the card of a reward or cost adapter.

    Args:
        run: the run.
        base: the base that the adapter stands on.
        folder: the adapter's folder; its parent's name says whether it is a cost.
        heads: how many outputs its head has.
        measured: ``calibration.json`` of the reward or the cost; of an ensemble, that of all members together.
        rows: the rows it was trained on.
    """
    cost = "sign" in measured
    lines = [
        "",
        f"# {'Cost' if cost else 'Reward'} model of the run {run.recipe.name}",
        "",
        "A LoRA adapter with a float32 head that scores the last token of an answer; "
        + ("above 0 means unsafe." if cost else "higher is better."),
        "",
        *_origin(run, base.lm, run.recipe.reward_base()),
        f"- Trained on: {_counted(str(row.source) for row in rows)}.",
        "",
        "## What it is worth",
        "",
        *(_cost_worth(measured) if cost else _reward_worth(measured)),
        "",
        "## How to load it",
        "",
        *_classifier_snippet(base, run.recipe.reward_base(), heads, _scales(folder, heads, measured)),
        *_versions(),
    ]
    _write(folder, run.recipe.reward_base(), "text-classification", ["reward-model", "lora"], lines)


def write_policy_card(run: Run, base: SharedBase, folder: Path, facts: Sequence[str]) -> None:
    """Write the card of a policy adapter; `facts` are sentences of its stage."""
    lines = [
        "",
        f"# Policy of the run {run.recipe.name}",
        "",
        *_origin(run, base.lm, run.recipe.model),
        *(f"- {fact}" for fact in facts),
        "",
        "## How to load it",
        "",
        "```python",
        "import torch",
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer" + _import_quantization(run.recipe.model),
        "",
        'folder = "."  # this folder, or its name on the Hub',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = AutoPeftModelForCausalLM.from_pretrained({_options(run.recipe.model)}).eval()",
        *_exact(run.recipe.model),
        f"turns = {_QUESTION}]",
        'inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", '
        "return_dict=True)",
        "ids = model.generate(**inputs, max_new_tokens=64)",
        'print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
        *_versions(),
    ]
    _write(folder, run.recipe.model, "text-generation", ["lora"], lines)


def _write(folder: Path, model: ModelSection, task: str, tags: list[str], lines: list[str]) -> None:
    name = hub_id(model)
    front: dict[str, Any] = {"library_name": "peft", "pipeline_tag": task, "tags": ["rlaif", *tags]}
    front |= {"base_model": name, "base_model_relation": "adapter"} if name else {}
    text, yaml = io.StringIO(), YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(front, text)
    files.write_text(folder / NAME, f"---\n{text.getvalue()}---\n" + "\n".join(lines) + "\n")


def hub_id(model: ModelSection) -> str | None:
    """Return the name by which the Hub knows a model; None for a folder, whose path is nobody else's business."""
    name = model.model_name_or_path
    if name in builtin.EMBEDDED:
        return builtin.EMBEDDED[name].hub
    return None if Path(name).is_dir() else name


def _origin(run: Run, lm: Any, model: ModelSection) -> list[str]:
    shown = hub_id(model) or f"a model of the type {lm.config.model_type} in a local folder"
    if model.model_name_or_path in builtin.EMBEDDED:
        shown += ", as unpacked from a Q4_1 file by `rlaif models fetch`"
    kind = "4" if model.load_in_4bit else "8" if model.load_in_8bit else ""
    details = f"in {kind} bits" if kind else f"in {str(compute_dtype(model.dtype, default_device()))[6:]}"
    if model.load_in_4bit:
        nested = " with double quantization" if model.use_bnb_nested_quant else ""
        details = f"in 4 bits ({model.bnb_4bit_quant_type}{nested})"
    lines = [f"- Base: {shown}, {details}. Adapters fit the base in the precision that they were trained in."]
    if "revise" in run.recipe.stages or run.recipe.feedback != "human":
        constitution = run.constitution
        lines.append(f"- Constitution: {constitution.name} {constitution.version}, sha256 {constitution.hash}.")
    return lines


def _counted(names: Iterable[str]) -> str:
    counts = Counter(names)
    parts = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return f"{sum(counts.values())} rows ({parts or 'none'})"


def _reward_worth(measured: dict[str, Any]) -> list[str]:
    rules = {"longer": "the longer answer", "shorter": "the shorter answer", "refusal_words": "refusal words"}
    rules["bag_of_words"] = "a bag-of-words Bradley-Terry model"
    rates = {f"this model, {tag}": rate for tag, rate in measured["heldout"].items()}
    rates |= {rules[name]: rate for name, rate in measured["baselines"].items()}
    lines = ["| on held-out comparisons | right | 95 % interval |", "|---|---|---|"]
    lines += [f"| {_cell(name)} | {_share(rate)} |" for name, rate in rates.items()]
    temperature = measured["temperature"]["temperature"]
    lines += [
        "",
        f"- Negative log-likelihood {measured['nll']:.3f}, expected calibration error {measured['ece']:.3f}, fitted "
        f"temperature {'none' if temperature is None else f'{temperature:.3g}'}.",
        f"- Scores are {_shifted(measured)}; the average is 0 on {measured['reference']}.",
    ]
    lines += ["", "## Known biases", ""]
    length = measured["length_correlation"]["spearman"]
    told = "not measurable" if length is None else f"{length:.2f}"
    lines.append(f"- Rank correlation of scores with the length of answers: {told}.")
    for name, found in measured["counterfactual"].items():
        if found["mean"]:
            lines.append(
                f"- Exchanging {name} in prompt and answer moves a score by {found['mean']['mean']:+.3f} deviations on "
                f"average and by {found['mean_absolute']:.3f} in size ({found['answers']} answers)."
            )
    own = measured["heldout"]["all"]["rate"]
    better = [rules[name] for name, rate in measured["baselines"].items() if rate["rate"] >= own]
    if better:
        lines.append(f"- It is no better than {', '.join(better)} on these comparisons.")
    return lines


def _shifted(measured: dict[str, Any]) -> str:
    if len(measured["members"]) == 1:
        return f"shifted by {measured['offset']:.6g} and divided by {measured['scale']:.6g}"
    return f"the mean of {len(measured['members'])} members (heads and adapters), each shifted and scaled by itself"


def _cost_worth(measured: dict[str, Any]) -> list[str]:
    shown = {
        "sign": "sign of the cost",
        "sign_of_unsafe": "sign, of unsafe answers",
        "sign_of_safe": "sign, of safe answers",
        "order": "the more harmful answer is higher",
    }
    lines = ["| on held-out rows | right | 95 % interval |", "|---|---|---|"]
    return lines + [f"| {text} | {_share(measured[name])} |" for name, text in shown.items() if measured[name]]


def _share(rate: dict[str, Any]) -> str:
    return f"{rate['rate']:.1%} of {rate['n']} | {rate['low']:.1%} to {rate['high']:.1%}"


def _cell(text: str) -> str:
    return "".join(char for char in text if char.isprintable()).replace("|", "\\|")


def _scales(folder: Path, heads: int, measured: dict[str, Any]) -> list[dict[str, float]]:
    """Return the scales of an adapter's own members; adapters of an ensemble have as many heads each."""
    number = int(folder.parent.name.rpartition("-")[2]) - 1 if folder.parent.name.startswith("reward-") else 0
    scales: list[dict[str, float]] = measured["members"]
    return scales[number * heads : (number + 1) * heads]


def _import_quantization(model: ModelSection) -> str:
    return ", BitsAndBytesConfig" if model.load_in_4bit or model.load_in_8bit else ""


def _exact(model: ModelSection) -> list[str]:
    """Return the lines that let 4-bit layers compute in the type they were loaded with, on every CPU."""
    if not model.load_in_4bit:
        return []
    return [
        "for module in model.modules():",
        '    if hasattr(module, "support_avx512bf16_for_cpu"):',
        "        module.support_avx512bf16_for_cpu = False  # else some CPUs compute in bfloat16",
    ]


def _options(model: ModelSection, **more: Any) -> str:
    """Return the arguments that load a base in the precision of a recipe, as Python writes them."""
    dtype = compute_dtype(model.dtype, default_device())
    parts = ["folder", *(f"{key}={value}" for key, value in more.items()), f"dtype={dtype}"]
    skipped = 'llm_int8_skip_modules=["score", "lm_head"]'
    if model.load_in_4bit:
        parts.append(
            f"quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype={dtype}, "
            f'bnb_4bit_quant_type="{model.bnb_4bit_quant_type}", '
            f"bnb_4bit_use_double_quant={model.use_bnb_nested_quant}, {skipped})"
        )
    elif model.load_in_8bit:
        parts.append(f"quantization_config=BitsAndBytesConfig(load_in_8bit=True, {skipped})")
    return ", ".join(parts)


def _classifier_snippet(
    base: SharedBase, model: ModelSection, heads: int, scales: Sequence[dict[str, float]]
) -> list[str]:
    end = base.tokenizer.raw.convert_ids_to_tokens(base.tokenizer.end_of_turn)
    text = "text = tokenizer.apply_chat_template(turns, tokenize=False)"
    trimmed = "" if base.ready_head is not None else f".rstrip().removesuffix({end!r}) + {end!r}"
    offsets, divisors = ([one[key] for one in scales] for key in ("offset", "scale"))
    return [
        "```python",
        "import torch",
        "from peft import AutoPeftModelForSequenceClassification",
        "from transformers import AutoTokenizer" + _import_quantization(model),
        "",
        'folder = "."  # this folder, or its name on the Hub',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = AutoPeftModelForSequenceClassification.from_pretrained({_options(model, num_labels=heads)}).eval()",
        *_exact(model),
        "model.config.pad_token_id = tokenizer.pad_token_id",
        f'turns = {_QUESTION}, {{"role": "assistant", "content": "About eight minutes."}}]',
        text + trimmed,
        'inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)',
        "with torch.no_grad():",
        "    heads = model(**inputs).logits[0].float()",
        f"offset, scale = torch.tensor({offsets}), torch.tensor({divisors})",
        "print(((heads.cpu() - offset) / scale).mean().item())",
        "```",
    ]


def _versions() -> list[str]:
    return ["", f"Made with {', '.join(f'{name} {version(name)}' for name in _PACKAGES)}."]
