"""Recipes: every mistake is named with its place, and --set changes what the file says."""

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from rlaif.documents import shipped
from rlaif.errors import ConfigError
from rlaif.recipe import STAGES, Recipe, load_recipe

SHIPPED = sorted(shipped("recipes").glob("*.yaml"))
GOOD = """\
name: good
model:
  model_name_or_path: tiny
  lora_r: 4
seed: 7
sft:
  learning_rate: 3e-4
ppo:
  rollout_batch: 8
  minibatch: 4
  microbatch: 2
"""


def recipe(tmp_path: Path, text: str = GOOD, *overrides: str) -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return load_recipe(path, list(overrides)).recipe


def complaint(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        recipe(tmp_path, text, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "")


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_by_its_name_and_finds_its_files(path: Path) -> None:
    loaded = load_recipe(Path(path.stem))
    assert loaded.path == path and loaded.recipe.name == path.stem
    named = [loaded.constitution, *loaded.prompts, *loaded.human_files]
    assert all(file.is_file() for file in named)


def test_there_are_recipes_to_check() -> None:
    assert shipped("recipes") / "quickstart.yaml" in SHIPPED


def test_what_is_not_said_has_a_default(tmp_path: Path) -> None:
    found = recipe(tmp_path, "name: short\nmodel: tiny\n")
    assert found.model.model_name_or_path == "tiny" and found.model.lora_r == 16
    assert found.stages == ["revise", "sft", "label", "reward", "ppo", "evaluate"] == list(STAGES)
    assert (found.feedback, found.label.method, found.seed) == ("ai", "judge", 0)
    assert found.folder() == Path("runs/short")


def test_responses_of_labels_and_ppo_stay_warm_where_only_their_length_is_set(tmp_path: Path) -> None:
    found = recipe(tmp_path, GOOD, *(f"{part}.sampling.max_new_tokens=5" for part in ("revise", "label", "ppo")))
    settings = (found.revise.sampling, found.label.sampling, found.ppo.sampling)
    assert [(part.max_new_tokens, part.temperature) for part in settings] == [(5, 0.7), (5, 1.0), (5, 1.0)]


def test_the_run_folder_is_the_output_where_one_is_named(tmp_path: Path) -> None:
    assert recipe(tmp_path, GOOD, "output=elsewhere/x").folder() == Path("elsewhere/x")


def test_files_are_looked_for_beside_the_recipe_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "away").mkdir()
    for place in ("home", "away"):
        (tmp_path / place / "mine.yaml").write_text("")
    (tmp_path / "away" / "rows.jsonl").write_text("")
    monkeypatch.chdir(tmp_path / "away")
    (tmp_path / "home" / "r.yaml").write_text(GOOD + "constitution: mine\nprompts: [rows, harmful]\n")
    loaded = load_recipe(tmp_path / "home" / "r.yaml")
    assert loaded.constitution == tmp_path / "home" / "mine.yaml"
    assert loaded.prompts == [tmp_path / "away" / "rows.jsonl", shipped("prompts") / "harmful.jsonl"]


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  minibatch:", "  minibach:", "r.yaml:10:3: ppo.minibach: unknown key; did you mean `minibatch`?"),
        ("seed: 7", "sede: 7", "r.yaml:5:1: sede: unknown key; did you mean `seed`?"),
        ("seed: 7", "zzzz: 7", "r.yaml:5:1: zzzz: unknown key; known keys: name, model, seed, output,"),
        ("seed: 7", "name: two", "r.yaml:5:1: the key `name` stands twice (first in line 1). Remove one."),
        ("name: good\n", "", "r.yaml:1:1: name: this key is missing. Add it."),
        ("  model_name_or_path: tiny\n", "", "r.yaml:2:1: model.model_name_or_path: this key is missing. Add it."),
        ("name: good", "name: ../up", "r.yaml:1:1: name: String should match pattern"),
        ("lora_r: 4", "lora_r: 0", "r.yaml:4:3: model.lora_r: Input should be greater than 0 (found 0)"),
        ("lora_r: 4", "lora_r: .nan", "r.yaml:4:3: model.lora_r: "),
        ("3e-4", ".inf", "r.yaml:7:3: sft.learning_rate: Input should be a finite number (found inf)"),
        ("3e-4", ".nan", "r.yaml:7:3: sft.learning_rate: Input should be"),
        ("3e-4", "fast", "r.yaml:7:3: sft.learning_rate: Input should be a valid number"),
        ("seed: 7", "seed: -1", "r.yaml:5:1: seed: Input should be greater than or equal to 0 (found -1)"),
        ("seed: 7", "seed: 4294967296", "r.yaml:5:1: seed: Input should be less than 4294967296"),
        ("seed: 7", "prompts: []", "r.yaml:5:1: prompts: List should have at least 1 item"),
        ("seed: 7", "stages: []", "r.yaml:5:1: stages: List should have at least 1 item"),
        ("seed: 7", "stages: [ppo, reward]", "r.yaml:5:1: stages: stages run in this order, each once: revise, sft,"),
        ("seed: 7", "stages: [sft, sft]", "r.yaml:5:1: stages: stages run in this order, each once: revise, sft,"),
        ("seed: 7", "stages: [rewrite]", "r.yaml:5:10: stages.0: Input should be 'revise', 'sft'"),
        ("seed: 7", "feedback: humans", "r.yaml:5:1: feedback: Input should be 'ai', 'human' or 'mixed'"),
        ("  lora_r: 4", "  load_in_4bit: true\n  load_in_8bit: true", "r.yaml:2:1: model: load_in_4bit and load"),
        ("seed: 7", "revise: {filters: [empty, dull]}", "revise.filters: no filter `dull`; filters: empty, too short,"),
        ("seed: 7", "revise: {must_refuse_tags: [odd]}", "r.yaml:5:1: revise: must_refuse_tags names `odd`, which"),
        ("minibatch: 4", "minibatch: 3", "r.yaml:8:1: ppo: rollout_batch x samples_per_prompt = 8 must be a"),
        ("microbatch: 2", "microbatch: 3", "a multiple of minibatch = 4, and that a multiple of microbatch = 3"),
        ("sft:\n", "sft:\n  max_steps: 1\n   x: 2\n", "r.yaml:8:5: not readable as YAML"),
        (GOOD, "- a list\n", "r.yaml:1:1: the file holds a list; keys with values are expected"),
        (GOOD, "", "r.yaml:1:1: the file holds nothing; keys with values are expected"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place(old: str, new: str, expected: str, tmp_path: Path) -> None:
    assert old in GOOD
    assert expected in complaint(tmp_path, GOOD.replace(old, new))


def test_several_mistakes_are_named_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("seed: 7", "sede: 7").replace("lora_r: 4", "lora_r: -4").replace("minibatch: 4", "minibatch: x")
    lines = complaint(tmp_path, text).splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["r.yaml:4:3", "model.lora_r"],
        ["r.yaml:10:3", "ppo.minibatch"],
        ["r.yaml:5:1", "sede"],
    ]


def test_a_recipe_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nosuch\.yaml: no such file"):
        load_recipe(Path("nosuch.yaml"))


@pytest.mark.parametrize(
    ("estimator", "kl_place", "aggregation"),
    [
        ("gae", "reward", "token"),
        ("rloo", "reward", "constant"),
        ("grpo", "loss", "sequence"),
        ("dr_grpo", "loss", "constant"),
        ("reinforce", "reward", "constant"),
    ],
)
def test_an_estimator_brings_its_authors_place_of_the_kl_and_sum_over_tokens(
    estimator: str, kl_place: str, aggregation: str, tmp_path: Path
) -> None:
    keys = ("ppo.samples_per_prompt=4", f"ppo.advantage_estimator={estimator}")
    found = recipe(tmp_path, GOOD, *keys).ppo
    assert (found.kl_place, found.aggregation, found.has_critic) == (kl_place, aggregation, estimator == "gae")
    for place in ("reward", "loss"):
        assert recipe(tmp_path, GOOD, *keys, f"ppo.kl_in={place}").ppo.kl_place == place
    for over in ("token", "sequence", "constant"):
        assert recipe(tmp_path, GOOD, *keys, f"ppo.loss_aggregation={over}").ppo.aggregation == over


def test_a_microbatch_may_be_larger_than_a_minibatch(tmp_path: Path) -> None:
    assert recipe(tmp_path, GOOD, "ppo.microbatch=64").ppo.microbatch == 64


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["feedback=human"], "feedback is `human`, but human.files is empty; name the files that hold the labels"),
        (["feedback=mixed"], "feedback is `mixed`, but human.files is empty"),
        (["stages=[revise, sft, ppo]"], "ppo needs the stage `reward` before it, or ppo.reward_function"),
        (["ppo.sampling.temperature=0"], "PPO needs a temperature above 0 and top_p 1"),
        (["ppo.sampling={top_p: 0.9}"], "PPO needs a temperature above 0 and top_p 1"),
        (
            ["ppo.advantage_estimator=rloo"],
            "ppo: advantage_estimator `rloo` compares responses to one prompt, and samp",
        ),
        (["ppo.advantage_estimator=grpo"], "samples_per_prompt is 1; at least 2 are expected"),
        (["ppo.advantage_estimator=reinforce", "ppo.lam=0.9"], "lam is read where advantage_estimator is `gae`, and"),
        (["ppo.advantage_estimator=reinforce", "ppo.critic=trunk"], "critic is read where advantage_estimator is"),
        (
            ["ppo.advantage_estimator=reinforce", *(f"ppo.{key}=1" for key in ("rollout_batch", "minibatch"))],
            "advantage_estimator `reinforce` compares responses; rollout_batch of at least 2 is expected",
        ),
        (["ppo.advantage_estimator=ppo"], "Input should be 'gae', 'rloo', 'grpo', 'dr_grpo' or 'reinforce'"),
        (["ppo.warmup_updates=9", "ppo.updates=8"], "warmup_updates is 9, and there are 8 updates in all"),
        (["ppo.kl_coef=0", "ppo.kl_target=6"], "kl_target multiplies kl_coef, which is 0; give a kl_coef above 0"),
        (["ppo.ptx_batch=4"], "ptx_batch is read where there is a text, and ptx_file names none"),
        (
            [
                "stages=[revise,sft,label,reward,ppo]",
                "reward.num_heads=2",
                "ppo.reward_model.ensemble=uncertainty",
                "ppo.independent=[{name: h, member: 2}]",
            ],
            "the reward model has one member, without the one that is the independent score, which agrees with itself",
        ),
        (["ppo.judge=base"], "judge is read where the judge's rating is a score, and none is; see reward_function"),
        (["ppo.ptx_coef=1"], "ptx_coef is above 0, but ptx_file names no text to learn from"),
        (["ppo.ptx_coef=1", "ppo.ptx_file=none.txt"], "ppo.ptx_file: no file `none.txt`; looked beside the recipe"),
        (["stages=[sft]"], "sft needs the stage `revise` before it"),
        (["stages=[reward]"], "reward needs the stage `label` before it"),
        (["stages=[label]", "label.method=revision"], "label.method `revision` needs the stage `revise` before it"),
    ],
)
def test_stages_that_lack_what_they_need_are_refused(overrides: list[str], expected: str, tmp_path: Path) -> None:
    assert expected in complaint(tmp_path, GOOD, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["feedback=human", "human.files=[labels.jsonl]"],
        ["feedback=human", "stages=[revise, sft]"],
        ["stages=[ppo]", "ppo.reward_function=brief"],
        ["stages=[label, reward]", "label.method=revision", "feedback=human", "human.files=[labels.jsonl]"],
        ["stages=[evaluate]"],
    ],
)
def test_stages_that_have_what_they_need_are_taken(overrides: list[str], tmp_path: Path) -> None:
    recipe(tmp_path, GOOD, *overrides)


# --- --set --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("seed=8", "", "seed", 8),
        ("ppo.minibatch=8", "ppo", "minibatch", 8),
        ("reward.learning_rate=1e-3", "reward", "learning_rate", 0.001),
        ("revise.revise_tags=[a, b]", "revise", "revise_tags", ["a", "b"]),
        ("label.prompts_per_tag={harmful: 3}", "label", "prompts_per_tag", {"harmful": 3}),
        ("model.model_revision=null", "model", "model_revision", None),
        ("model.lora_r=2", "model", "lora_r", 2),
        ("human.annotator=a=b", "human", "annotator", "a=b"),
        ("output='7'", "", "output", "7"),
    ],
)
def test_an_override_takes_the_place_of_a_value(
    override: str, section: str, key: str, value: Any, tmp_path: Path
) -> None:
    found = recipe(tmp_path, GOOD, override)
    assert getattr(getattr(found, section) if section else found, key) == value
    assert found.sft.learning_rate == 0.0003 and found.model.model_name_or_path == "tiny"


def test_a_section_may_be_overridden_two_deep_and_the_last_one_counts(tmp_path: Path) -> None:
    keys = ("top_p=0.5", "temperature=2", "top_p=0.25")
    found = recipe(tmp_path, GOOD, *(f"evaluate.sampling.{key}" for key in keys))
    assert (found.evaluate.sampling.top_p, found.evaluate.sampling.temperature) == (0.25, 2.0)


def test_a_model_that_is_only_a_name_keeps_it_when_a_key_is_set(tmp_path: Path) -> None:
    found = recipe(tmp_path, "name: short\nmodel: tiny\n", "model.load_in_4bit=true")
    assert (found.model.model_name_or_path, found.model.load_in_4bit) == ("tiny", True)
    assert recipe(tmp_path, GOOD, "model=other").model.model_name_or_path == "other"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("ppo.updats=3", "--set ppo.updats=3: ppo.updats: unknown key; did you mean `updates`?"),
        ("ppo.updates=many", "--set ppo.updates=many: ppo.updates: Input should be a valid integer"),
        ("qqq=3", "--set qqq=3: qqq: unknown key; known keys: name, model"),
        ("revise={filters: [dull]}", "--set revise={filters: [dull]}: revise.filters: no filter `dull`"),
        ("seed", "--set seed: `section.key=value` is expected."),
        ("=3", "--set =3: `section.key=value` is expected."),
        ("ppo..updates=3", "--set ppo..updates=3: `section.key=value` is expected."),
        ("seed=[1", "--set seed=[1: `[1` is not a YAML value."),
        ("seed={a: 1, a: 2}", "--set seed={a: 1, a: 2}: `{a: 1, a: 2}` is not a YAML value."),
        ("name=2024-13-01", "--set name=2024-13-01: `2024-13-01` is not a YAML value."),
        ("seed.x=1", "--set seed.x=1: `seed` is a value, not a section."),
        ("model.lora_r.x=1", "--set model.lora_r.x=1: `model.lora_r` is a value, not a section."),
    ],
)
def test_a_wrong_override_is_named_as_it_was_given(override: str, expected: str, tmp_path: Path) -> None:
    assert complaint(tmp_path, GOOD, override).startswith(expected)


def test_an_override_goes_into_a_section_that_the_file_writes_as_one_value(tmp_path: Path) -> None:
    text = GOOD + "rounds: 2\n"
    assert recipe(tmp_path, text, "rounds.count=3").rounds.count == 3
    found = recipe(tmp_path, text, "rounds.gate=score").rounds
    assert (found.count, found.gate) == (2, "score")


def test_a_mistake_of_the_file_keeps_its_line_beside_an_override(tmp_path: Path) -> None:
    text = GOOD.replace("lora_r: 4", "lora_r: -4")
    assert complaint(tmp_path, text, "ppo.updates=3").startswith("r.yaml:4:3: model.lora_r: ")


def test_a_resolved_recipe_written_as_yaml_loads_as_the_same(tmp_path: Path) -> None:
    found = recipe(tmp_path, GOOD, "ppo.kl_target=6", "revise.must_refuse_tags=[harmful]")
    with (tmp_path / "again.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(found.model_dump(), file)
    assert load_recipe(tmp_path / "again.yaml").recipe == found
