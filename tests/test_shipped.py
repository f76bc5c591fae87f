"""What ships with the package: every file loads, there is as much of it as was promised, and nothing is given away."""

from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from rlaif import constitution as constitutions
from rlaif.constitution import Constitution
from rlaif.documents import shipped
from rlaif.human.labels import read_labels
from rlaif.prompting import load_template
from rlaif.recipe import STAGES, Loaded, load_recipe
from rlaif.records import Prompt, read_rows, text_of
from rlaif.stages.rewards import find_function

ROOT = Path(__file__).resolve().parents[1]
CONSTITUTIONS = sorted(shipped("constitutions").glob("*.yaml"))
RECIPES = sorted(shipped("recipes").glob("*.yaml"))
TEMPLATES = sorted(shipped("prompts").glob("*.jinja"))
PROMPT_SETS = sorted(set(shipped("prompts").glob("*.jsonl")) - {shipped("prompts") / "attacks.jsonl"})
TAGS = {"harmful", "ordinary", "lookalike"}


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


@cache
def prompts_of(path: Path) -> list[Prompt]:
    return read_rows(path, Prompt)


@cache
def constitution(path: Path) -> Constitution:
    return constitutions.load(path)


@cache
def recipe(path: Path) -> Loaded:
    return load_recipe(path)


ALL_PROMPTS = [row for path in PROMPT_SETS for row in prompts_of(path)]


def plain(text: str) -> str:
    return " ".join(text.casefold().split())


def triples(text: str) -> set[tuple[str, ...]]:
    words = "".join(char if char.isalnum() else " " for char in text.casefold()).split()
    return {tuple(words[start : start + 3]) for start in range(len(words) - 2)}


def test_the_shipped_files_are_those_of_the_repository() -> None:
    assert names(CONSTITUTIONS) == ["harmless", "helpful-honest"]
    assert names(RECIPES) == ["human", "known-cost", "known-reward", "quickstart"]
    asked = ["break", "compare", "continue", "contrast", "critique", "gather", "instruct", "keep", "propose", "rate"]
    assert names(TEMPLATES) == [*asked, "revise", "revise_directly", "weigh"]
    assert set(names(PROMPT_SETS)) == TAGS


@pytest.mark.parametrize("path", CONSTITUTIONS, ids=names(CONSTITUTIONS))
def test_a_shipped_constitution_loads_under_its_own_name_with_examples_and_tests(path: Path) -> None:
    found = constitution(path)
    least = {"harmless": 12, "helpful-honest": 8}[path.stem]
    assert found.name == path.stem
    assert len(found.principles) >= least
    assert len(found.tests) >= 20
    assert found.comparisons
    assert any(example.revision == example.response for example in found.examples), "none where nothing has to change"
    assert any(example.revision != example.response for example in found.examples)
    for tag in TAGS:
        assert any(principle.applies(tag) for principle in found.principles), f"nothing applies to {tag} prompts"


@pytest.mark.parametrize("path", CONSTITUTIONS, ids=names(CONSTITUTIONS))
def test_the_first_line_of_a_shipped_constitution_names_the_schema_beside_it(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=./constitution.schema.json"
    assert path.with_name("constitution.schema.json").is_file()


@pytest.mark.parametrize("path", CONSTITUTIONS, ids=names(CONSTITUTIONS))
def test_the_better_side_of_worked_comparisons_is_not_always_the_same(path: Path) -> None:
    """Else the judge is shown that the place decides."""
    assert {example.better for example in constitution(path).comparisons} == {"first", "second"}


@pytest.mark.parametrize("path", CONSTITUTIONS, ids=names(CONSTITUTIONS))
def test_the_judge_is_not_measured_on_what_it_is_shown(path: Path) -> None:
    found = constitution(path)
    shown = {plain(entry.prompt) for entry in (*found.examples, *found.comparisons)}
    assert [test.prompt for test in found.tests if plain(test.prompt) in shown] == []


def test_no_evaluation_prompt_stands_in_a_constitution() -> None:
    measured = {plain(row.prompt) for row in ALL_PROMPTS if row.split == "eval"}
    for path in CONSTITUTIONS:
        found = constitution(path)
        entries = (*found.examples, *found.comparisons, *found.tests)
        assert [entry.prompt for entry in entries if plain(entry.prompt) in measured] == []


@pytest.mark.parametrize("path", TEMPLATES, ids=names(TEMPLATES))
def test_a_shipped_template_uses_exactly_the_variables_it_declares(path: Path) -> None:
    template = load_template(path.stem)
    assert template.path == path
    text = template.render(**{name: f"<<{name}>>" for name in template.variables})
    assert all(f"<<{name}>>" in text for name in template.variables)


@pytest.mark.parametrize("path", PROMPT_SETS, ids=names(PROMPT_SETS))
def test_a_shipped_prompt_set_is_large_and_every_row_has_tag_category_and_split(path: Path) -> None:
    rows = prompts_of(path)
    least, categories = {"harmful": (80, 12), "ordinary": (80, 12), "lookalike": (40, 8)}[path.stem]
    assert len(rows) >= least
    assert {row.tag for row in rows} == {path.stem}
    assert all(row.category for row in rows)
    by_split = {split: {row.category for row in rows if row.split == split} for split in ("train", "eval")}
    assert len(by_split["train"]) >= categories
    assert by_split["train"] == by_split["eval"]


def test_prompt_ids_are_unique_across_the_sets() -> None:
    repeated = [name for name, count in Counter(row.id for row in ALL_PROMPTS).items() if count > 1]
    assert repeated == []


def test_no_prompt_stands_twice_least_of_all_in_both_splits() -> None:
    repeated = [text for text, count in Counter(plain(row.prompt) for row in ALL_PROMPTS).items() if count > 1]
    assert repeated == []


def test_no_train_prompt_is_nearly_an_evaluation_prompt_of_its_category() -> None:
    """`prompts/README.md` promises: it shares less than half of its sequences of three words."""
    near = [
        (train.id, measured.id)
        for train in ALL_PROMPTS
        for measured in ALL_PROMPTS
        if (train.split, measured.split) == ("train", "eval")
        and (train.tag, train.category) == (measured.tag, measured.category)
        and (own := triples(train.prompt))
        and 2 * len(own & triples(measured.prompt)) >= len(own)
    ]
    assert near == []


def test_prompts_readme_counts_what_is_there() -> None:
    text = (shipped("prompts") / "README.md").read_text(encoding="utf-8")
    for path in PROMPT_SETS:
        line = next(line for line in text.splitlines() if line.startswith(f"| `{path.name}`"))
        rows = prompts_of(path)
        splits = Counter(row.split for row in rows)
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[2] == str(len(rows))
        assert cells[5] == f"{splits['train']} / {splits['eval']}"


@pytest.mark.parametrize("path", RECIPES, ids=names(RECIPES))
def test_a_shipped_recipe_loads_under_its_own_name_and_what_it_names_is_there(path: Path) -> None:
    loaded = recipe(path)
    assert loaded.recipe.name == path.stem
    assert constitution(loaded.constitution).principles
    assert all(prompts_of(prompts) for prompts in loaded.prompts)
    if loaded.recipe.ppo.reward_function:
        assert callable(find_function(loaded.recipe.ppo.reward_function))


@pytest.mark.parametrize("path", RECIPES, ids=names(RECIPES))
def test_a_shipped_recipe_asks_for_no_more_prompts_than_there_are(path: Path) -> None:
    loaded = recipe(path)
    rows = [row for prompts in loaded.prompts for row in prompts_of(prompts)]
    there = Counter((row.split, row.tag) for row in rows)
    for stage in loaded.recipe.stages:
        split = "eval" if stage == "evaluate" else "train"
        wanted = getattr(getattr(loaded.recipe, stage), "prompts_per_tag", {})
        assert {tag: count for tag, count in wanted.items() if there[split, tag] < count} == {}


def test_the_quickstart_is_the_whole_pipeline_on_the_embedded_model_in_four_bits() -> None:
    found = recipe(shipped("recipes") / "quickstart.yaml").recipe
    assert (found.model.model_name_or_path, found.model.load_in_4bit) == ("smollm2-135m", True)
    assert (found.feedback, found.label.method) == ("mixed", "revision")
    assert tuple(found.stages) == STAGES


def test_the_human_recipe_takes_its_labels_from_a_file_that_is_usable_throughout() -> None:
    loaded = recipe(shipped("recipes") / "human.yaml")
    assert loaded.recipe.feedback == "human"
    for path in loaded.human_files:
        imported = read_labels(path)
        assert imported.unused == []
        assert {row.split for row in imported.comparisons} == {"train"}  # reward.heldout_fraction splits them
        known = {plain(row.prompt) for row in ALL_PROMPTS}
        assert [row.id for row in imported.comparisons if plain(text_of(row.prompt)) in known] == []


def test_the_known_cost_recipe_scores_few_words_and_limits_how_few() -> None:
    found = recipe(shipped("recipes") / "known-cost.yaml").recipe
    assert found.ppo.constraint and (found.ppo.constraint.function, found.ppo.reward_function) == ("curt", "brief")
    assert found.stages == ["ppo", "evaluate"]


def test_the_known_reward_recipe_needs_no_labels_and_no_reward_model() -> None:
    found = recipe(shipped("recipes") / "known-reward.yaml").recipe
    assert found.ppo.reward_function == "brief"
    assert found.stages == ["ppo", "evaluate"]
    assert found.ppo.updates <= 20
