"""The documents against the code: commands, keys with their defaults, metrics, errors, file tree, examples, links."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from rlaif import constitution as constitutions
from rlaif import errors
from rlaif.cli import app
from rlaif.health import INDEPENDENT, INDEPENDENT_SPREAD, KINDS, HealthSection
from rlaif.maths import agreement
from rlaif.recipe import PpoSection, Recipe, load_recipe
from rlaif.records import Comparison, Demonstration, Prompt, Ranking, Rating, Row

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
ALL = "\n".join([README, *PAGES.values()])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
METRIC = re.compile(r"(rollout|policy|value|cost_value|constraint|kl|ptx)/[a-z_]+")
CHANGES = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


@cache
def commands() -> dict[str, Any]:
    """Return every command of the command line by its words."""
    found: dict[str, Any] = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        inner = getattr(command, "commands", None)
        if inner is None:
            found[" ".join(words)] = command
        else:
            for name, sub in inner.items():
                walk(sub, (*words, name))

    walk(typer.main.get_command(app), ())
    return found


def options(command: Any) -> set[str]:
    return {name for one in command.params for name in one.opts if name.startswith("--")}


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(text) if kind == language]


def rows(text: str, heading: str = "") -> list[list[str]]:
    """Return the cells of every table row, under one heading or in the whole text; header rows are included."""
    if heading:
        text = text.split(f"\n{heading}\n", 1)[1]
        level = heading.split(" ")[0]
        text = re.split(rf"^#{{1,{len(level)}}} ", text, maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in lines]


def ticked(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", sorted(commands()))
def test_every_command_and_each_of_its_options_is_documented(command: str) -> None:
    assert re.search(rf"`?rlaif {command}\b", ALL), f"`rlaif {command}` stands nowhere in README or docs"
    missing = [name for name in options(commands()[command]) if name not in ALL]
    assert missing == []


def spoken() -> Iterator[tuple[str, list[str]]]:
    """Yield page and words of every `rlaif ...` in a shell block or between backticks."""
    for page, text in {"README.md": README, "AGENTS.md": (ROOT / "AGENTS.md").read_text(), **PAGES}.items():
        lines = [line for body in blocks(text, "bash") for line in body.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`(rlaif [^`]+)`", FENCE.sub("", text).replace("\n", " "))
        for line in lines:
            if line.strip().startswith("rlaif "):
                yield page, shlex.split(line.split(" #")[0].split(" > ")[0])[1:]


def test_every_command_that_a_page_gives_exists_with_its_options() -> None:
    wrong = []
    for page, words in spoken():
        if words == ["--help"]:
            continue
        name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in commands()), "")
        known = options(commands()[name]) if name else set()
        unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in {*known, "--help"}]
        if not name or unknown:
            wrong.append(f"{page}: rlaif {' '.join(words)}")
    assert wrong == []


# --- recipes ------------------------------------------------------------------------------------------------------


def keys_of(model: type[BaseModel], default: Any = PydanticUndefined, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each key of a section and of those inside it, with the default that a recipe without it gets."""
    for name, field in model.model_fields.items():
        kind, inner = field.annotation, get_args(field.annotation)
        value = getattr(default, name) if isinstance(default, BaseModel) else field.get_default()
        optional = next((one for one in inner if isinstance(one, type) and issubclass(one, BaseModel)), None)
        if type(None) in inner and optional:
            yield f"{prefix}{name}", value
            yield from keys_of(optional, PydanticUndefined, f"{prefix}{name}.")
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            if value is PydanticUndefined:
                yield f"{prefix}{name}", value
            yield from keys_of(kind, value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
            if get_origin(kind) in (dict, list) and isinstance(inner[-1], type) and issubclass(inner[-1], BaseModel):
                item = ".NAME." if get_origin(kind) is dict else "[]."
                yield from keys_of(inner[-1], PydanticUndefined, f"{prefix}{name}{item}")


def written(default: Any) -> str:
    """Return a default as the tables write it."""
    if default is PydanticUndefined:
        return "required"
    if default is None or default == "":
        return "none"
    if isinstance(default, list):
        return f"`[{', '.join(default)}]`"
    return f"`{json.dumps(default)}`" if isinstance(default, bool | dict) else f"`{default}`"


def test_the_table_of_recipe_keys_has_every_key_with_its_default_and_no_other() -> None:
    documented = {}
    for cells in rows(PAGES["recipe.md"]):
        for key in ticked(cells[0]):
            assert key not in documented, f"`{key}` stands twice"
            assert len(cells) == 3 and cells[2], f"`{key}` has no meaning"
            documented[key] = cells[1]
    assert documented == {key: written(default) for key, default in keys_of(Recipe)}


def test_the_table_of_ppo_defaults_has_the_defaults_of_the_code() -> None:
    defaults = dict(keys_of(PpoSection, PpoSection()))
    documented = {ticked(cells[0])[0]: cells[1] for cells in rows(PAGES["ppo.md"], "## Defaults")[1:]}
    assert documented == {key: written(defaults[key]) for key in documented}
    own_affair = {"prompts_per_tag", "reward_function", "judge", "combine"}
    own_affair |= {"save_every_updates", "sample_every_updates"}
    own_affair |= {"gate_safety", "gate_helpfulness", "gate_tags", "ptx_file"}
    own_affair |= {"constraint", "constraint.cost", "constraint.function"}
    own_affair |= {key for key in defaults if key.startswith(("rewards", "independent", "health"))}
    assert documented.keys() == defaults.keys() - own_affair


def test_the_table_of_health_has_every_rule_with_its_limit() -> None:
    limits = dict(keys_of(HealthSection, HealthSection()))
    documented = {ticked(cells[0])[0]: cells[1] for cells in rows(PAGES["ppo.md"], "## Health")[1:]}
    assert documented == {kind: written(limits[kind]) if kind in limits else "always" for kind in KINDS}


def yaml_blocks() -> list[tuple[str, str]]:
    return [(page, body) for page, text in {"README.md": README, **PAGES}.items() for body in blocks(text, "yaml")]


def test_every_yaml_example_is_a_valid_recipe_or_constitution(tmp_path: Path) -> None:
    kinds = []
    for index, (page, body) in enumerate(yaml_blocks()):
        path = tmp_path / f"{page}-{index}.yaml"
        path.write_text(body)
        if "\nprinciples:" in body:
            kinds.append("constitution")
            assert constitutions.load(path).tests
        else:
            kinds.append("recipe")
            assert load_recipe(path).recipe.name
    assert sorted(set(kinds)) == ["constitution", "recipe"]


def problem_codes() -> set[str]:
    """Return the codes of problems that the code of constitutions gives."""
    found: set[str] = set()
    for name in ("documents", "validation", "constitution", "constitution_check", "constitution_length"):
        for node in ast.walk(ast.parse((ROOT / "rlaif" / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                texts = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
                if called in ("Problem", "problem", "warning", "get"):
                    found |= {
                        text
                        for text in texts
                        if re.fullmatch(r"[a-z]+(-[a-z]+)+|circle|contradiction|unreadable", text)
                    }
    return found | {"missing-key", "unknown-key"}  # named in a table of pydantic's types


def test_every_code_of_a_problem_is_explained_and_no_other() -> None:
    cells = rows(PAGES["constitutions.md"], "## Check")[1:]
    assert sorted(code for row in cells for code in ticked(row[0])) == sorted(problem_codes())
    assert {row[1] for row in cells} == {"error", "warning"}


# --- metrics ------------------------------------------------------------------------------------------------------


def metric_keys() -> set[str]:
    """Return the metric keys that stand in PPO's code, and the two that it puts together from parts."""
    stages = ROOT / "rlaif" / "stages"
    names = ("ppo", "exploration", "constraint", "rollouts", "ptx")
    sources = [(stages / f"{name}.py").read_text(encoding="utf-8") for name in names]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    whole = {text for text in texts if METRIC.fullmatch(text)}
    assert "/gradient_norm" in texts or {"policy/gradient_norm", "value/gradient_norm"} <= whole
    of_parts = {"rollout/score/NAME", "rollout/score_std/NAME"}  # stages/composite.py puts them together
    norms = {f"{role}/gradient_norm" for role in ("policy", "value", "cost_value")}
    return whole | norms | {INDEPENDENT, INDEPENDENT_SPREAD} | of_parts


def test_every_metric_of_ppo_is_explained_and_no_other() -> None:
    cells = rows(PAGES["ppo.md"], "## Metrics")[1:]
    assert all(row[1] for row in cells)
    documented = [key for row in cells for key in ticked(row[0])]
    assert sorted(documented) == sorted({"update", "step", *metric_keys()})


def test_every_curve_of_the_report_is_a_documented_metric() -> None:
    from rlaif.report.curves import PPO_CURVES

    assert {curve.key for curve in PPO_CURVES} <= metric_keys()


# --- errors, tree, links ------------------------------------------------------------------------------------------


def test_every_exception_is_in_the_readme_and_no_other() -> None:
    documented = {ticked(cells[0])[0] for cells in rows(README, "## Errors and exit codes") if "Error`" in cells[0]}
    assert documented == {name for name, value in vars(errors).items() if isinstance(value, type)}


def tree_lines() -> list[tuple[str, str]]:
    """Return path and comment of each line of README's file tree."""
    (body,) = blocks(README.split("\n## File tree\n")[1].split("\n## ")[0], "")
    found, folders = [], [""]
    for line in body.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, comment = line.strip().partition(" ")
        folders[depth + 1 :] = [folders[depth] + name]
        found.append((folders[depth] + name, comment.strip()))
    return found


def test_the_file_tree_lists_every_file_of_the_package_with_a_comment_and_no_other() -> None:
    listed = {path: comment for path, comment in tree_lines() if path.startswith("rlaif/") and not path.endswith("/")}
    there = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "rlaif").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name not in ("__init__.py", "py.typed")
    }
    assert listed.keys() == there
    assert [path for path, comment in listed.items() if not comment] == []


def test_the_file_tree_names_nothing_that_is_not_there() -> None:
    for path, comment in tree_lines():
        assert (ROOT / path).exists(), path
        if not path.startswith("rlaif/"):
            named = re.findall(r"[\w./-]+\.(?:yaml|md|py)\b", comment)
            assert [name for name in named if not (ROOT / path / name).exists()] == []


def test_every_script_is_in_the_readme() -> None:
    scripts = [path for path in (ROOT / "scripts").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    line = next(comment for path, comment in tree_lines() if path == "scripts/")
    assert {path.relative_to(ROOT / "scripts").as_posix() for path in scripts} == set(line.split(", "))


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_between_the_pages_leads_somewhere() -> None:
    broken = []
    for path in [ROOT / "README.md", ROOT / "AGENTS.md", ROOT / "CHANGELOG.md", *DOCS.glob("*.md")]:
        for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            if target.startswith("https://"):
                continue
            file, _, anchor = target.partition("#")
            found = path.parent / file if file else path
            if not found.exists() or (anchor and anchor not in anchors(found.read_text(encoding="utf-8"))):
                broken.append(f"{path.name}: {target}")
    assert broken == []


def test_every_path_of_the_repository_that_is_named_is_there() -> None:
    pattern = r"`((?:docs|tests|rlaif|scripts|recipes|constitutions|prompts)/[\w./-]+)`"
    assert [path for path in re.findall(pattern, ALL) if not (ROOT / path).exists()] == []


# --- data formats -------------------------------------------------------------------------------------------------


def example_rows() -> list[Row]:
    """Return the rows of README's examples, each as the kind that its columns say."""
    found: list[Row] = []
    for body in blocks(README, "json"):
        for line in body.splitlines():
            data = json.loads(line)
            kinds = {"chosen": Comparison, "completion": Demonstration, "rating": Rating, "ranks": Ranking}
            kind = next((kind for column, kind in kinds.items() if column in data), Prompt)
            found.append(kind.model_validate(data))
    return found


def test_the_readme_shows_one_row_of_each_kind_with_every_column() -> None:
    found = example_rows()
    kinds = ["Prompt", "Prompt", "Demonstration", "Comparison", "Rating", "Ranking"]
    assert [type(row).__name__ for row in found] == kinds
    shown = {
        kind: {name for row in found if type(row) is kind for name in row.model_fields_set} for kind in map(type, found)
    }
    assert shown == {kind: kind.model_fields.keys() for kind in shown}


def test_the_vote_in_the_readme_is_what_its_logits_give() -> None:
    (comparison,) = [row for row in example_rows() if isinstance(row, Comparison)]
    vote = comparison.votes[0]
    both = agreement.both_orders(*vote["logits"])
    assert both.preference == pytest.approx(comparison.preference, abs=0.005)
    assert (both.strength, both.bias) == pytest.approx((vote["strength"], vote["bias"]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of trainers that this package does not use
def test_trl_trains_on_the_rows_of_the_readme_as_the_readme_says(tiny_model: Path, tmp_path: Path) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    kinds = [
        (SFTTrainer, SFTConfig, Demonstration, AutoModelForCausalLM.from_pretrained(tiny_model)),
        (DPOTrainer, DPOConfig, Comparison, AutoModelForCausalLM.from_pretrained(tiny_model)),
        (
            RewardTrainer,
            RewardConfig,
            Comparison,
            AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1),
        ),
    ]
    for trainer, config, kind, model in kinds:
        file = tmp_path / f"{kind.__name__}.jsonl"
        row = next(row for row in example_rows() if isinstance(row, kind))
        file.write_text(row.model_dump_json() + "\n")
        dataset = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
        if trainer is RewardTrainer:
            dataset = dataset.remove_columns("margin")  # it would take the empty one for a number
        settings = config(output_dir=str(tmp_path / "out"), max_steps=1, bf16=False, report_to="none", use_cpu=True)
        done = trainer(model=model, args=settings, train_dataset=dataset, processing_class=tokenizer).train()
        assert done.global_step == 1


# --- for contributors ---------------------------------------------------------------------------------------------


def test_agents_md_has_fewer_than_60_lines() -> None:
    assert len((ROOT / "AGENTS.md").read_text(encoding="utf-8").splitlines()) < 60


def test_the_changelog_has_unreleased_entries_of_one_sentence_each() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)[0] == "Unreleased"
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= set(CHANGES)
    entries = re.findall(r"^- (.+?)(?=\n- |\n\n|\n*\Z)", text, re.MULTILINE | re.DOTALL)
    assert entries
    assert [one for one in entries if not one.endswith(".") or re.search(r"[.!?] [A-Z]", one)] == []
