"""The commands `rlaif reward`: a first word that is no command is a recipe, and scores come out as rows."""

import json
import subprocess
import sys

import pytest
import tiny_rewards

from rlaif import cli

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")

ROW = {"prompt": "Hello?", "completion": "Good day."}


@pytest.fixture
def rlaif(monkeypatch, capsys):
    def command(*words):
        monkeypatch.setattr(sys, "argv", ["rlaif", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return command


def test_help_shows_the_stage_and_both_commands_without_torch(tmp_path):
    code = "import sys\nfrom rlaif.cli import main\ntry:\n    main()\nfinally:\n    print({'torch'} & set(sys.modules))"
    child = subprocess.run(
        [sys.executable, "-c", code, "reward", "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert child.returncode == 0
    for name in ("score", "serve", "RECIPE"):
        assert f"\n  {name} " in child.stdout
    assert child.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    "words", [["nowhere.yaml"], ["--set", "seed=1", "nowhere.yaml"], ["nowhere.yaml", "--set", "a=b"]]
)
def test_a_first_word_that_is_no_command_is_a_recipe(rlaif, words):
    code, _, err = rlaif("reward", *words)
    assert code == 2
    assert "nowhere.yaml: no such file" in err


def test_an_unknown_option_is_refused(rlaif):
    code, _, err = rlaif("reward", "--sett", "seed=1", "nowhere.yaml")
    assert code == 2
    assert "--sett" in err


def test_bad_rows_are_told_before_a_model_is_looked_for(rlaif, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + '\n{"prompt": "a"}\n{')
    code, _, err = rlaif("reward", "score", "rows.jsonl", "--model", "nowhere")
    assert code == 2
    assert "rows.jsonl:3: not a JSON object" in err
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + '\n{"prompt": "a"}\n')
    code, _, err = rlaif("reward", "score", "rows.jsonl", "--model", "nowhere")
    assert code == 2
    assert "rows.jsonl:2: has the columns prompt. Expected: `messages`" in err


def test_scores_are_printed_or_written_as_rows(rlaif, tmp_path, tiny_model):
    tiny_rewards.finished(tmp_path / "run", tiny_model)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    words = ["reward", "score", "rows.jsonl", "--model", "run"]
    code, out, err = rlaif(*words)
    assert code == 0
    printed = json.loads(out)
    assert {**printed, "score": None} == {**ROW, "score": None}
    assert "1 rows; mean score" in err
    code, out, _ = rlaif(*words, "--output", "scored.jsonl")
    assert (code, out) == (0, "")
    assert json.loads((tmp_path / "scored.jsonl").read_text()) == printed
