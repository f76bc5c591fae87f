"""A run answered by a server, killed at many steps and continued: the same rows, and next to nothing asked twice.

The server is a process of its own that answers by the conversation and the seed alone and counts what it is asked; the
run is a child that kills itself (see `kills`). The last test drives a real server with the embedded model.
"""

import functools
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import kills
import pytest
from scripted import CONSTITUTION, PROMPTS

from rlaif import cli

pytestmark = pytest.mark.slow

CONCURRENCY = 3
STRIDE = 41  # every so many steps one kill; each step of a whole run would take an hour
URL = "RLAIF_TEST_URL"


def write_recipe(folder, url, model, **revise):
    everyone = {"responder": "big", "critic": "big", "reviser": "big", "filters": [], **revise}
    recipe = {
        "name": "served",
        "model": "no/such-model",
        "output": str(folder / "run"),
        "constitution": "constitution.yaml",
        "prompts": ["prompts.jsonl"],
        "stages": ["revise", "label"],
        "engines": {"big": {"model": model, "urls": [url], "concurrency": CONCURRENCY}},
        "revise": everyone,
        "label": {"method": "revision", "judge": "big"},
    }
    (folder / "constitution.yaml").write_text(CONSTITUTION)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


# --- in the process of its own ---------------------------------------------------------------------------------------


def prepare(folder):
    write_recipe(folder, os.environ[URL], "m")


def run(folder):
    from rlaif.pipeline import run_recipe
    from rlaif.progress import Progress
    from rlaif.recipe import load_recipe

    run_recipe(load_recipe(folder / "recipe.yaml"), Progress(quiet=True))


def stepping_wire():
    """Name the moments before a request is sent and after its answer has come as steps, too."""
    from rlaif.engines.wire import Wire

    post = Wire.post

    @functools.wraps(post)
    async def call(*arguments):
        kills.step()
        reply = await post(*arguments)
        kills.step()
        return reply

    Wire.post = call


def rows(folder):
    names = ("1-revise/*.jsonl", "3-label/*.jsonl", "3-label/quality.json")
    found = [path for pattern in names for path in sorted((folder / "run").glob(pattern))]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def asked():
    """Return how often each question was asked since the last time."""
    with urllib.request.urlopen(os.environ[URL], timeout=30) as reply:
        return Counter(json.load(reply))


def killed():
    import tempfile

    from rlaif.stages import label, revise  # noqa: F401  (imported before any fork, as all that follows)

    stepping_wire()
    with tempfile.TemporaryDirectory(dir=kills.MEMORY) as name:
        prepare(Path(name))
        run(Path(name))
        expected = rows(Path(name))
    questions = asked()
    assert len(expected) == 6 and set(questions.values()) == {1}

    def check(folder):
        run(folder)
        assert rows(folder) == expected
        counts = asked()
        assert counts.keys() == questions.keys()
        assert sum(counts.values()) - len(counts) <= CONCURRENCY, counts

    return kills.at_every_step(prepare, run, check, stride=STRIDE)


if __name__ == "__main__":
    kills.main({"killed": killed})


# --- in the process of the tests -------------------------------------------------------------------------------------


def test_a_killed_run_is_the_one_that_was_not_and_repeats_only_what_was_under_way(monkeypatch):
    server = [sys.executable, str(Path(__file__).with_name("hostile_server.py"))]
    with subprocess.Popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        monkeypatch.setenv(URL, process.stdout.readline().strip())
        assert kills.in_own_process(__file__, "killed", seconds=500) >= 7
        process.stdin.close()


@pytest.fixture
def real_server(tmp_path):
    """Address and model name of `transformers serve` with the embedded model."""
    from rlaif.model.builtin import fetch

    folder = fetch("smollm2-135m", print)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    with (
        (tmp_path / "serve.log").open("w") as log,
        subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log) as process,
    ):
        for _ in range(300):
            assert process.poll() is None, (tmp_path / "serve.log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
        process.terminate()


def test_a_real_server_with_the_embedded_model_answers_the_stages(real_server, tmp_path, monkeypatch, capsys):
    url, model = real_server
    few = {"prompts_per_tag": {"harmful": 1, "ordinary": 1}, "sampling": {"max_new_tokens": 16}}
    recipe = write_recipe(tmp_path, url, model, few_shot=1, **few)

    def rlaif(*words):
        monkeypatch.setattr(sys, "argv", ["rlaif", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, capsys.readouterr().err

    code, said = rlaif("revise", str(recipe))
    assert code == 0, said
    chains = [json.loads(line) for line in (tmp_path / "run" / "1-revise" / "chains.jsonl").read_text().splitlines()]
    assert len(chains) == 2 and all(len(chain["response"].split()) >= 2 for chain in chains)
    assert all(chain["steps"][0]["revision"] for chain in chains if chain["tag"] == "harmful")
    manifest = json.loads((tmp_path / "run" / "1-revise" / "manifest.json").read_text())
    assert manifest["counts"]["failed"] == 0

    code, said = rlaif("label", str(recipe), "--set", "engines.big.logprobs=required")
    assert code == 2 and "sends no log-probabilities" in said and "Traceback" not in said
    _, said = rlaif("label", str(recipe))
    assert "the server offers no log-probabilities" in said and "Traceback" not in said
    judge = json.loads((tmp_path / "run" / "3-label" / "judge.json").read_text())
    assert (judge["method"], judge["model"], judge["option_mass"]) == ("verdict", model, None)

    code, said = rlaif("revise", str(recipe), "--set", "engines.big.model=another")
    assert code == 2 and "refuses every request: HTTP 400" in said, said
