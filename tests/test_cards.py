"""Model cards: what they say, that they say nothing of where and when, and that their code works as it stands."""

import json
import re
import subprocess
import sys

import pytest
import tiny_rewards
import tiny_runs
from ruamel.yaml import YAML
from tiny_rows import ROWS

from rlaif import files
from rlaif.recipe import ModelSection
from rlaif.scoring import Scorer
from rlaif.stages import reward
from rlaif.stages.cards import hub_id, write_policy_card
from rlaif.stages.reward_model import encode_group

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")

TURNS = [
    {"role": "user", "content": "How long do eggs boil?"},
    {"role": "assistant", "content": "About eight minutes."},
]


def train(folder, policy, **settings):
    folder.mkdir(exist_ok=True)
    four_bit = settings.pop("four_bit", False)
    sections = {"reward": {"start_from": "base", "max_steps": 2, "learning_rate": 1e-2, **settings}}
    with tiny_runs.opened(folder, policy, **sections, model={"load_in_4bit": four_bit}) as run:
        files.write_jsonl(run.stage_folder("label") / "comparisons.jsonl", ROWS)
        reward.reward(run)
        (folder / "recipe.yaml").write_bytes((folder / "tiny.yaml").read_bytes())
        return run.stage_folder("reward")


def front_and_text(card):
    _, front, text = card.split("---\n", 2)
    return YAML(typ="safe", pure=True).load(front), text


@pytest.mark.slow
def test_the_card_of_a_reward_says_what_was_measured_and_neither_where_nor_when(tmp_path, tiny_model):
    stage = train(tmp_path / "run", tiny_model, num_adapters=2)
    card = (stage / "adapter" / "README.md").read_text()
    front, text = front_and_text(card)
    assert front == {
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["rlaif", "reward-model", "lora"],
    }
    assert "- Trained on: 8 rows (8 construction)." in text
    assert re.search(r"- Constitution: tiny 1, sha256 [0-9a-f]{64}\.", text)
    assert re.search(r"\| this model, all \| [\d.]+% of 4 \| [\d.]+% to [\d.]+% \|", text)
    assert "| a bag-of-words Bradley-Terry model |" in text
    assert "## Known biases" in text
    assert "- Rank correlation of scores with the length of answers:" in text
    assert re.search(r"Made with rlaif-toolkit .*peft \d", text)
    assert str(tmp_path) not in card
    assert str(tiny_model) not in card
    again = train(tmp_path / "again", tiny_model, num_adapters=2)
    for name in ("adapter", "reward-2/adapter"):
        assert (again / name / "README.md").read_bytes() == (stage / name / "README.md").read_bytes()
    assert (stage / "adapter" / "README.md").read_bytes() != (stage / "reward-2/adapter/README.md").read_bytes()


def test_a_model_of_the_hub_is_named_and_a_folder_is_not(tiny_model):
    names = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct", "some/model": "some/model", str(tiny_model): None}
    assert {name: hub_id(ModelSection(model_name_or_path=name)) for name in names} == names


def snippet_of(card):
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


PLAYER = """
import contextlib, io, json, os, sys
shown = []
for folder, code in zip(sys.argv[1::2], sys.argv[2::2]):
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    shown.append(out.getvalue())
assert "rlaif" not in sys.modules
print(json.dumps(shown))
"""


def run_snippets(*folders):
    """Run the code of each folder's card in a fresh process; return what each printed."""
    words = [word for folder in folders for word in (folder, snippet_of((folder / "README.md").read_text()))]
    child = subprocess.run([sys.executable, "-c", PLAYER, *words], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_code_on_a_reward_card_gives_our_score(tmp_path, tiny_model_64):
    ours, folders = [], []
    for heads, four_bit in ((1, False), (3, False), (1, True), (2, True)):
        stage = train(tmp_path / f"{heads}-{four_bit}", tiny_model_64, num_heads=heads, four_bit=four_bit)
        scorer = Scorer.load(stage)
        ours.append(scorer.score([encode_group(scorer.model, TURNS[:1], [TURNS[1:]])])[0][0].score)
        folders.append(stage / "adapter")
    assert [float(shown) for shown in run_snippets(*folders)] == pytest.approx(ours, abs=1e-4)


@pytest.mark.slow
def test_the_code_on_the_card_for_somebody_elses_reward_model_gives_our_score(tmp_path, tiny_model):
    foreign = tiny_rewards.build_reward_model(tmp_path / "foreign")
    stage = train(tmp_path / "run", tiny_model, model=str(foreign))
    scorer = Scorer.load(tmp_path / "run")
    ours = scorer.score([encode_group(scorer.model, TURNS[:1], [TURNS[1:]])])[0][0].score
    assert float(run_snippets(stage / "adapter")[0]) == pytest.approx(ours, abs=1e-4)


@pytest.mark.slow
def test_the_code_on_a_policy_card_writes_an_answer(tmp_path, tiny_model):
    with tiny_runs.opened(tmp_path, tiny_model) as run:
        base = run.load_base()
        base.add_role("policy")
        base.save_role("policy", tmp_path / "policy")
        write_policy_card(run, base, tmp_path / "policy", ["Made up."])
    front, text = front_and_text((tmp_path / "policy" / "README.md").read_text())
    assert front["pipeline_tag"] == "text-generation"
    assert "- Made up." in text
    assert run_snippets(tmp_path / "policy")[0].endswith("\n")
