"""The command line: what each command prints, and the one message that each mistake gets."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs

from rlaif import cli, files
from rlaif.records import Comparison, read_rows

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")
ROOT = Path(__file__).parents[1]
PROMPTS = [
    {"id": f"{tag}-{number}", "prompt": f"A question {tag} {number}?", "tag": tag, "split": split}
    for tag in ("harmful", "ordinary")
    for number, split in enumerate(("train", "train", "eval"))
]
SMALL = {
    "revise": {"prompts_per_tag": {"harmful": 2, "ordinary": 2}, "few_shot": 0},
    "prompts": ["prompts.jsonl"],
}


@pytest.fixture
def rlaif(monkeypatch, capsys):
    """Run a command line in this process: ``code, out, err = rlaif("run", path)``."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["rlaif", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return command


@pytest.fixture
def small(tmp_path, tiny_model):
    """Write a recipe with prompts of its own: ``small(prompts=TEXT, model=FOLDER, **changes)``."""

    def write(*, prompts=None, model=None, **changes):
        text = "".join(json.dumps(row) + "\n" for row in PROMPTS) if prompts is None else prompts
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "prompts.jsonl").write_bytes(data)
        changes = {**SMALL, **changes, "output": str(tmp_path / "run")}
        return tiny_runs.write_recipe(tmp_path / "small.yaml", model or tiny_model, **changes)

    return write


def refused(result, *parts):
    """A mistake: exit code 2, one message on stderr with all of these parts, and no traceback."""
    code, out, err = result
    assert code == 2, err
    assert err.count("rlaif: ") == 1, err
    message = err[err.index("rlaif: ") :]
    for part in parts:
        assert part in message
    assert "Traceback" not in err + out
    return message


def checked(result, file, *parts):
    """What `constitution check` prints of a file with errors: exit code 2, and the parts on standard output."""
    refused(result, file, "Mend what is listed and check again.")
    for part in parts:
        assert part in result[1].replace(": error: ", ": ") or part in result[1]
    return result[1]


# --- what is imported ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["constitution", "check", str(ROOT / "constitutions" / "harmless.yaml")],
        ["run", "broken.yaml"],
    ],
)
def test_light_commands_do_not_import_torch(words, tmp_path):
    (tmp_path / "broken.yaml").write_text("name: [")
    code = (
        "import sys\nfrom rlaif.cli import main\nsys.argv = ['rlaif', *sys.argv[1:]]\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets', 'numpy', 'scipy'} & set(sys.modules)\n"
        "    print('imported:', sorted(heavy))"
    )
    child = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)
    assert child.stdout.splitlines()[-1] == "imported: []", child.stderr
    assert child.returncode == (2 if "broken.yaml" in words else 0)


def test_help_names_every_command(rlaif):
    code, out, _ = rlaif("--help")
    assert code == 0
    for command in ("run", *cli.STAGE_TITLES, "report", "chat", "env", "constitution", "human", "models"):
        assert f"  {command} " in out


def test_no_command_at_all_shows_the_help(rlaif):
    code, out, err = rlaif()
    assert code == 2
    assert "constitution" in out + err


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name: [unclosed\n", ["bad.yaml:2:1: not readable as YAML"]),
        ("name: a\nmodel: m\nname: b\n", ["bad.yaml:3:1: the key `name` stands twice (first in line 1)"]),
        ("name: a\nmodel: m\nppo:\n  update: 3\n", ["bad.yaml:4:3: ppo.update: unknown key; did you mean `updates`?"]),
        ("name: a\n", ["bad.yaml:1:1: model: this key is missing"]),
        ("name: a\nmodel: m\nstages: [ppo, sft]\n", ["bad.yaml:3:1: stages: stages run in this order"]),
        ("name: a\nmodel: m\nstages: []\n", ["bad.yaml:3:1: stages:"]),
        (
            "name: a\nmodel: m\nseed: x\nsft: {max_length: -1}\n",
            ["bad.yaml:3:1: seed:", "bad.yaml:4:7: sft.max_length"],
        ),
        ("name: a\nmodel: m\nppo: {minibatch: 5}\n", ["bad.yaml:3:1: ppo:", "multiple of minibatch = 5"]),
        ("name: a\nmodel: m\nfeedback: human\n", ["human.files is empty"]),
        ("- a\n", ["bad.yaml:1:1: the file holds a list"]),
        ("", ["bad.yaml:1:1: the file holds nothing"]),
    ],
)
def test_a_mistake_in_a_recipe_is_told_with_its_line_and_key(rlaif, tmp_path, text, parts):
    (tmp_path / "bad.yaml").write_text(text)
    refused(rlaif("run", "bad.yaml"), *parts)
    assert not (tmp_path / "runs").exists()


def test_a_recipe_that_is_not_there_or_not_text_is_told(rlaif, tmp_path):
    refused(rlaif("run", "nowhere.yaml"), "nowhere.yaml: no such file")
    refused(rlaif("sft", "nowhere.yaml"), "nowhere.yaml: no such file")
    (tmp_path / "latin.yaml").write_bytes(b"name: a\nmodel: m\xfc\n")
    refused(rlaif("run", "latin.yaml"), "latin.yaml:2: byte 0xfc is not UTF-8 text")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--set", "ppo.updates"], ["--set ppo.updates: `section.key=value` is expected"]),
        (["--set", "ppo.updates=[1"], ["--set ppo.updates=[1: `[1` is not a YAML value"]),
        (["--set", "ppo.update=3"], ["ppo.update: unknown key; did you mean `updates`?"]),
        (["--set", "seed.a=3"], ["--set seed.a=3: `seed` is a value, not a section"]),
        (["--from", "dpo"], ["small.yaml: has no stage `dpo`; its stages: revise, sft, label"]),
        (["--until", "revised"], ["small.yaml: has no stage `revised`"]),
    ],
)
def test_a_mistake_in_an_option_is_told_with_the_option_or_the_file(rlaif, small, words, parts):
    refused(rlaif("run", small(), *words), *parts)


def test_an_unknown_command_or_option_shows_how_to_get_help(rlaif, small):
    for words in (["fly"], ["run"], ["run", small(), "--fast"]):
        code, out, err = rlaif(*words)
        assert code == 2
        assert "--help" in err
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("version:", "version", ["own.yaml:3:1: not readable as YAML"]),
        ("description:", "describe:", ["own.yaml:3:1: describe: unknown key; did you mean `description`?"]),
        ("id: safe", "id: kind", ["own.yaml:6:", "kind"]),
        ("text: The answer is kind., ", "", ["own.yaml:5:", "text: this key is missing"]),
        ("principle: plain", "principle: nothing", ["own.yaml:9:", "nothing"]),
        ("  - {id: one", "  - {id: one, id: two", ["own.yaml:9:", "the key `id` stands twice"]),
    ],
)
def test_a_mistake_in_a_constitution_is_told_with_its_line_by_check_and_by_run(rlaif, small, tmp_path, old, new, parts):
    text = tiny_runs.CONSTITUTION
    assert old in text
    (tmp_path / "own.yaml").write_text(text.replace(old, new, 1))
    first = checked(rlaif("constitution", "check", "own.yaml"), "own.yaml", *parts)
    second = refused(rlaif("run", small(constitution="own.yaml")), *parts)
    told = [line.replace(": error: ", ": ", 1) for line in first.splitlines() if ": error: " in line]
    assert [line.split("own.yaml")[1] for line in told] == [line.split("own.yaml")[1] for line in second.splitlines()]


def test_a_constitution_without_principles_or_not_there_is_told(rlaif, small, tmp_path):
    (tmp_path / "empty.yaml").write_text('name: a\nversion: "1"\ndescription: d\nprinciples: []\n')
    checked(rlaif("constitution", "check", "empty.yaml"), "empty.yaml", "empty.yaml:4:1: error: principles:")
    refused(rlaif("run", small(constitution="nowhere")), "nowhere: no such file")


def test_check_tells_the_mistakes_of_all_files_at_once(rlaif, tmp_path):
    for name in ("one.yaml", "two.yaml"):
        (tmp_path / name).write_text("name: [")
    (tmp_path / "good.yaml").write_text(tiny_runs.CONSTITUTION)
    result = rlaif("constitution", "check", "one.yaml", "good.yaml", "two.yaml")
    refused(result, "2 errors in one.yaml, two.yaml.")
    first, second, third = result[1].splitlines()
    assert first.startswith("one.yaml:1:8: error: not readable as YAML")
    assert second == "good.yaml: tiny 1: 3 principles, 1 examples, 2 tests"
    assert third.startswith("two.yaml:1:8: error: not readable as YAML")


GOOD = json.dumps(PROMPTS[0])


@pytest.mark.parametrize(
    ("prompts", "parts"),
    [
        (f'{GOOD}\n{{"id": "x", "prompt": \n', ["prompts.jsonl:2: not a JSON object"]),
        (f'{GOOD}\n\n{{"id": "x", "prompt": " "}}\n', ["prompts.jsonl:3: prompt: an empty prompt"]),
        (
            f'{{"id": "x"}}\n{GOOD}\n',
            ["prompts.jsonl:1: (file): neither `prompt` nor `messages`; one of them is expected"],
        ),
        (f"{GOOD}\n{GOOD}\n", ["prompts.jsonl:2: the id `harmful-0` stands already in line 1"]),
        (f'{GOOD}\n{{"id": "x", "promt": "a?"}}\n', ["prompts.jsonl:2: promt: unknown key; did you mean `prompt`?"]),
        (f'{GOOD}\n{{"id": "x", "prompt": "a?", "split": "test"}}\n', ["prompts.jsonl:2: split:"]),
        (
            f'{GOOD}\n{{"id": "x", "prompt": "caf\xe9"}}\n'.encode("latin-1"),
            ["jsonl:2: byte 0xe9 is not UTF-8"],
        ),
        ("", ["prompts.jsonl: no rows"]),
        (f"{GOOD}\n", ["prompts_per_tag.harmful: 2 asked for; the prompt sets hold 1"]),
    ],
)
def test_a_mistake_in_a_prompt_set_is_told_with_its_line(rlaif, small, prompts, parts):
    refused(rlaif("run", small(prompts=prompts)), *parts)


def test_a_prompt_set_that_is_not_there_is_told(rlaif, small):
    refused(rlaif("run", small(), "--set", "prompts=[nowhere]"), "nowhere: no such file")


def model_copy(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    return folder


def test_a_model_that_does_not_exist_is_told_with_its_name(rlaif, small):
    parts = ["model `/nowhere/at/all`: cannot be loaded", "the id of one on the Hub"]
    refused(rlaif("run", small(model="/nowhere/at/all")), *parts)


def test_a_model_without_a_chat_template_is_told(rlaif, small, tiny_model, tmp_path):
    folder = model_copy(tiny_model, tmp_path)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    refused(rlaif("run", small(model=folder)), f"model `{folder}`: its tokenizer has no chat template")


def test_a_prompt_longer_than_the_models_context_is_told_with_its_id_and_what_to_lower(
    rlaif, small, tiny_model, tmp_path
):
    folder = model_copy(tiny_model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    long = {"id": "harmful-long", "prompt": "Why? " * 40, "tag": "harmful"}
    rows = "".join(json.dumps(row) + "\n" for row in [long, *PROMPTS])
    message = refused(rlaif("run", small(model=folder, prompts=rows)), "harmful-long", "context holds 64")
    assert "max_new_tokens" in message


def test_a_run_folder_in_use_is_told_with_the_process(rlaif, small, tmp_path):
    path = small()
    with files.run_lock(tmp_path / "run"):
        refused(rlaif("run", path), "in use by another process")


@pytest.mark.parametrize("command", ["report", "chat"])
def test_a_folder_that_is_no_run_is_told(rlaif, tmp_path, command):
    refused(rlaif(command, tmp_path), "not a run folder")
    refused(rlaif(command, tmp_path / "nowhere"), "not a run folder")


def test_chatting_with_a_run_that_has_no_policy_yet_says_to_run_it(rlaif, small, tmp_path):
    shutil.copy(small(), tmp_path / "recipe.yaml")
    refused(rlaif("chat", tmp_path), "has no policy yet", "Run its recipe first")


def test_a_stage_out_of_turn_says_which_one_to_run_first(rlaif, small):
    refused(rlaif("sft", small()), "demonstrations.jsonl: not there yet. Run the stage `revise` first: rlaif revise")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["human", "import", "nowhere.jsonl"], ["nowhere.jsonl: no such file"]),
        (["models", "fetch", "gpt"], ["`gpt` is not an embedded model; there is: smollm2-135m"]),
        (["constitution", "show", "harmless", "--principle", "nothing"], ["nothing"]),
        (["constitution", "show", "nowhere"], ["nowhere: no such file"]),
    ],
)
def test_other_mistakes_are_told(rlaif, words, parts):
    refused(rlaif(*words), *parts)


# --- how it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [KeyboardInterrupt(), SystemExit(130)])
def test_an_interrupt_prints_the_command_that_continues_and_exits_with_130(rlaif, monkeypatch, given):
    monkeypatch.setattr(cli, "app", lambda: (_ for _ in ()).throw(given))
    code, out, err = rlaif("run", "my recipe.yaml", "--from", "sft", "--set", "a.b=c d", "--until", "ppo")
    assert code == 130
    assert (
        err.strip().splitlines()[-1].endswith("Continue with: rlaif run 'my recipe.yaml' --set 'a.b=c d' --until ppo")
    )
    _, _, err = rlaif("run", "r.yaml", "--from=sft")
    assert err.endswith("Continue with: rlaif run r.yaml\n")


class DiskError(Exception):
    """As safetensors raises one: no OSError, and the cause in words only."""


@pytest.mark.parametrize(
    "problem",
    [
        OSError(28, "No space left on device"),
        OSError(27, "File too large"),
        OSError(122, "Disk quota exceeded"),
        DiskError("Error while serializing: I/O error: File too large (os error 27)"),
        RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 128 vs 22"),
    ],
)
def test_a_full_disk_is_one_message_however_it_shows_up(rlaif, monkeypatch, problem):
    monkeypatch.setattr(cli, "app", lambda: (_ for _ in ()).throw(problem))
    refused(rlaif("run", "x"), "the disk is full", "nothing finished is lost")


def test_a_full_disk_behind_another_error_is_found(rlaif, monkeypatch):
    def app():
        try:
            raise OSError(28, "No space left on device")
        except OSError as problem:
            raise ValueError("could not save") from problem

    monkeypatch.setattr(cli, "app", app)
    refused(rlaif("run", "x"), "the disk is full")


@pytest.mark.parametrize("problem", [ValueError("ours"), OSError(5, "Input/output error")])
def test_a_bug_of_ours_keeps_its_traceback(monkeypatch, problem):
    monkeypatch.setattr(cli, "app", lambda: (_ for _ in ()).throw(problem))
    with pytest.raises(type(problem)):
        cli.main()


def test_control_characters_in_a_message_do_not_reach_the_terminal(rlaif, tmp_path):
    (tmp_path / "bad.yaml").write_text('name: "\\e[31m\\a"\nmodel: m\n')
    _, _, err = rlaif("run", "bad.yaml")
    assert "\x1b" not in err
    assert "\x07" not in err


# --- what the other commands print -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_says_what_it_does_and_writes_the_report(rlaif, finished_run, tiny_model, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    recipe = tiny_runs.write_recipe(tmp_path / "tiny.yaml", tiny_model, output=str(tmp_path / "run"))
    (tmp_path / "run" / "report.html").unlink()
    code, _, err = rlaif("run", recipe)
    assert code == 0
    stages = ("1-revise", "2-sft", "3-label", "4-reward", "5-ppo", "6-evaluate")
    assert err.splitlines() == [*(f"{stage}: up to date" for stage in stages), f"report: {tmp_path}/run/report.html"]
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_run_with_until_and_a_single_stage_run_what_they_name(rlaif, small, tmp_path):
    code, _, err = rlaif("run", small(), "--until", "revise")
    assert code == 0
    assert err.splitlines()[0] == "1-revise"
    assert not (tmp_path / "run" / "2-sft").exists()
    code, _, err = rlaif("revise", small())
    assert (code, err) == (0, "1-revise: up to date\n")
    code, _, err = rlaif("revise", small(), "--set", "revise.few_shot=1")
    assert code == 0
    assert err.splitlines()[0] == "1-revise (input `recipe.revise` changed)"


@pytest.mark.slow
def test_report_prints_where_it_is(rlaif, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    assert rlaif("report", tmp_path / "run") == (0, f"{tmp_path}/run/report.html\n", "")


@pytest.mark.slow
def test_chat_with_a_prompt_shows_one_answer_of_the_base_and_one_of_the_policy(rlaif, finished_run):
    code, out, _ = rlaif("chat", finished_run, "--prompt", "Hello?", "--max-new-tokens", 4, "--temperature", 0)
    assert code == 0
    assert "base" in out
    assert "after PPO" in out
    assert rlaif("chat", finished_run, "--prompt", "Hello?", "--max-new-tokens", 4, "--temperature", 0)[1] == out


@pytest.mark.slow
def test_chat_keeps_both_conversations_until_an_empty_line(rlaif, finished_run, tmp_path, monkeypatch):
    shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "5-ppo")
    from rlaif.chat import Conversation

    asked, ask = [], Conversation.ask

    def noted(self, text):
        answers = ask(self, text)
        asked.append({role: [turn["content"] for turn in turns] for role, turns in self._turns.items()})
        return answers

    monkeypatch.setattr(Conversation, "ask", noted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello?\nAnd you?\n\nNever asked.\n"))
    code, out, _ = rlaif("chat", tmp_path / "run", "--max-new-tokens", 3)
    assert code == 0
    assert out.count("after SFT") == 2
    assert len(asked) == 2
    for turns in asked[1].values():
        assert turns[0::2] == ["Hello?", "And you?"]
    assert asked[1]["base"][1] == asked[0]["base"][1]


@pytest.mark.slow
def test_a_conversation_that_no_longer_fits_the_context_is_told(rlaif, finished_run):
    result = rlaif("chat", finished_run, "--prompt", "Hello?", "--max-new-tokens", 16384)
    refused(result, "does not fit the model's context of 16384", "--max-new-tokens")


def test_env_prints_versions_and_hardware_as_lines_or_json(rlaif):
    code, out, _ = rlaif("env", "--json")
    found = json.loads(out)
    assert code == 0
    assert {"python", "torch", "transformers", "trl", "peft", "processor", "memory", "gpu"} <= set(found)
    assert "not fetched" in found["embedded models"]
    code, out, _ = rlaif("env")
    assert [line.split()[0] for line in out.splitlines()][:2] == ["python", "platform"]


def test_models_list_says_what_is_fetched(rlaif):
    code, out, _ = rlaif("models", "list")
    assert code == 0
    assert out.startswith("smollm2-135m")
    assert "Apache-2.0: not fetched yet (93 MB)" in out


def test_constitution_check_show_and_schema(rlaif):
    code, out, _ = rlaif("constitution", "check", "harmless", "helpful-honest")
    assert code == 0
    assert len(out.splitlines()) == 2
    code, out, _ = rlaif("constitution", "show", "harmless", "--principle", "no-weapons")
    assert code == 0
    assert out.splitlines()[0] == "no-weapons: No help with weapons"
    assert [line.split(":")[0].strip() for line in out.splitlines()[2:5]] == ["critique", "revision", "comparison"]
    code, out, _ = rlaif("constitution", "schema")
    assert json.loads(out) == json.loads((ROOT / "constitutions" / "constitution.schema.json").read_text())


def test_human_import_writes_comparisons_and_keeps_the_rest_with_reasons(rlaif, tmp_path):
    rows = [
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi?\n\nAssistant: Go."},
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Ho?\n\nAssistant: Go."},
    ]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = rlaif("human", "import", "labels.jsonl", "--annotator", "ann", "--tag", "ordinary")
    assert code == 0
    assert "2 rows (hh-rlhf): 1 comparisons -> comparisons.jsonl" in out
    [row] = read_rows(tmp_path / "comparisons.jsonl", Comparison)
    assert (row.annotator, row.tag, row.chosen[0]["content"]) == ("ann", "ordinary", "Hello.")
    [unused] = tiny_runs.rows(tmp_path / "comparisons.unused.jsonl")
    assert (unused["line"], unused["reason"]) == (2, "contexts differ")


def test_human_quality_tells_who_agrees_with_the_others(rlaif, tmp_path):
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    pairs = [{"prompt": f"Question {n}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(30)]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]
    write("ann.jsonl", pairs)  # of nobody, so of whom the file is named after
    write(
        "others.jsonl", [{**row, "annotator": name} for name, rows in (("ben", pairs), ("cy", turned)) for row in rows]
    )
    code, out, _ = rlaif("human", "quality", "ann.jsonl", "others.jsonl")
    assert code == 0
    assert out.startswith("30 pairs of answers, 30 of them shared; Krippendorff's alpha")
    assert [line.split()[0] for line in out.splitlines()[3:]] == ["cy", "ann", "ben"]
    write("known.jsonl", turned[:20])
    code, out, _ = rlaif("human", "quality", "ann.jsonl", "others.jsonl", "--known", "known.jsonl", "--json")
    found = json.loads(out)
    assert (code, found["shared"]) == (0, 30)
    assert [one["annotator"] for one in found["annotators"]] == ["ann", "ben", "cy"]
    code, _, err = rlaif("human", "quality", "ann.jsonl")
    assert code == 2
    assert "ann.jsonl: in 30 labels (by ann) no pair of answers is judged by two annotators" in err
    assert "Traceback" not in err
