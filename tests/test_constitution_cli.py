"""The commands of `rlaif constitution`: what each prints, and the one message that each mistake gets."""

import json
import sys
from pathlib import Path

import pytest

from rlaif import cli

SMALL = """\
name: small
version: "1"
description: For tests.
principles:
  - {id: kind, title: Kindness, text: The answer is kind., critique: Is it kind?}
  - {id: rare, title: Rarity, text: It is rarely drawn., weight: 0.0001}
examples:
  - {id: one, principle: kind, prompt: P1, response: R1, critique: C1, revision: V1}
comparisons:
  - {prompt: P2, first: A2, second: B2, better: second}
"""


@pytest.fixture
def rlaif(monkeypatch, capsys):
    """Run a command line in this process: ``code, out, err = rlaif("show", path)``."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["rlaif", "constitution", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        shown = capsys.readouterr()
        assert "Traceback" not in shown.out + shown.err
        return code, shown.out, shown.err

    return command


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(SMALL)
    return Path("small.yaml")


# --- check -----------------------------------------------------------------------------------------------------------


def test_warnings_are_printed_with_their_place_and_leave_the_exit_code_at_0(rlaif, small):
    code, out, err = rlaif("check", small)
    assert (code, err) == (0, "")
    warning, last = out.splitlines()
    assert warning.startswith("small.yaml:6:58: warning: principles.1.weight: `rare` gets at most 0.0001 of the draws")
    assert last == "small.yaml: small 1: 2 principles, 1 examples, 0 tests, 1 warning"


def test_errors_end_with_2_and_warnings_are_told_beside_them(rlaif, small):
    small.write_text(SMALL.replace("principle: kind", "principle: kin").replace("better: second", "better: none"))
    code, out, err = rlaif("check", small, "harmless")
    assert code == 2
    assert [line.split(": ")[:2] for line in out.splitlines()[:2]] == [
        ["small.yaml:8:15", "error"],
        ["small.yaml:10:41", "error"],
    ]
    assert out.splitlines()[2].startswith("harmless: harmless 1.0: 15 principles")
    assert err == "rlaif: 2 errors in small.yaml. Mend what is listed and check again.\n"


def test_json_lists_the_problems_of_all_files_and_nothing_else(rlaif, small):
    code, out, _ = rlaif("check", small, "harmless", small, "--json")
    assert code == 0
    (problem,) = json.loads(out)
    assert list(problem) == ["file", "line", "column", "severity", "code", "message"]
    assert (problem["file"], problem["line"], problem["code"]) == ("small.yaml", 6, "rarely-drawn")
    assert json.loads(rlaif("check", "harmless", "--json")[1]) == []


def test_the_prompt_sets_decide_what_can_be_drawn(rlaif, small, tmp_path):
    (tmp_path / "own.jsonl").write_text(json.dumps({"id": "a", "prompt": "P?", "tag": "weather"}) + "\n")
    small.write_text(SMALL.replace("weight: 0.0001", "applies_to: [weather]"))
    assert "never-drawn" in rlaif("check", small, "--json")[1]
    assert json.loads(rlaif("check", small, "--prompts", "own.jsonl", "--json")[1]) == []
    code, _, err = rlaif("check", small, "--prompts", "none")
    assert (code, err.startswith("rlaif: none: no such file")) == (2, True)


def test_the_context_can_be_given(rlaif, small):
    assert "too-long" in rlaif("check", small, "--max-tokens", 64, "--json")[1]


# --- show ------------------------------------------------------------------------------------------------------------


def test_without_a_prompt_show_prints_the_wordings(rlaif, small):
    code, out, _ = rlaif("show", small, "--principle", "kind")
    assert code == 0
    assert out.splitlines()[:3] == ["kind: Kindness", "  The answer is kind.", "  critique:   Is it kind?"]
    assert out.splitlines()[-2] == "  weight 1; for prompts tagged anything"


def test_with_a_prompt_show_prints_three_requests_with_their_worked_turns(rlaif, small):
    code, out, _ = rlaif(
        "show", small, "--principle", "kind", "--prompt", "Why?", "--response", "So.", "--other", "No."
    )
    assert code == 0
    heads = [line for line in out.splitlines() if line.startswith(("===", "---"))]
    turns = ["--- user ---", "--- assistant ---", "--- user ---"]
    assert heads == [
        "=== kind: critique ===",
        *turns,
        "=== kind: revise ===",
        *turns,
        "=== kind: compare ===",
        *turns,
    ]
    assert '"Why?"\n\nThe assistant answered:\n"So."\n\nIs it kind?\n' in out
    assert "A reviewer said: [the critique]" in out
    assert 'Answer A:\n"So."\n\nAnswer B:\n"No."' in out
    assert rlaif("show", small, "--prompt", "Why?", "--few-shot", 0)[1].count("--- user ---") == 6


def test_with_a_model_show_prints_the_text_with_its_control_tokens(rlaif, small, tiny_model):
    words = ("--principle", "kind", "--prompt", "Why <|end|>?", "--few-shot", 0, "--model", tiny_model)
    code, out, _ = rlaif("show", small, *words)
    assert code == 0
    assert '=== kind: critique ===\n<|start|>user\nSomeone asked an assistant:\n"Why <|end|>?"\n' in out
    assert out.count("<|end|>\n<|start|>assistant\n") == 3


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--principle", "none"], "small: no principle `none`; there are: kind, rare."),
        (
            ["--model", "smollm2-135m"],
            "--model: shows whole requests, which need a prompt. Give --prompt TEXT as well.",
        ),
        (["--prompt", "P", "--model", "nowhere"], "model `nowhere`: its tokenizer cannot be loaded"),
    ],
)
def test_what_cannot_be_shown_is_told(rlaif, small, words, part):
    code, _, err = rlaif("show", small, *words)
    assert code == 2
    assert part in err
