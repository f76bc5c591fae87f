"""What every stage is given: prompts, principles, seeds, folders, and fingerprints of what a result depends on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted import HARM, PLAIN, PROMPTS, make_run

from rlaif.errors import DataError, StageError
from rlaif.recipe import RewardSection, SamplingSection
from rlaif.stages.run import Run, path_sha256

Maker = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    return lambda *args, **kwargs: make_run(tmp_path, monkeypatch, *args, **kwargs)


def two_files(make: Maker) -> Run:
    run = make()
    run.recipe.prompts.append("more.jsonl")
    run.loaded.prompts.append(run.loaded.prompts[0].with_name("more.jsonl"))
    return run


def test_prompts_of_a_split_come_in_file_order_or_tag_by_tag(make: Maker) -> None:
    run = make()
    assert [prompt.id for prompt in run.select("train", {})] == ["h1", "h2", "h3", "o1", "o2"]
    assert [prompt.id for prompt in run.select("eval", {})] == ["h4", "o3"]
    assert [prompt.id for prompt in run.select("train", {PLAIN: 1, HARM: 2})] == ["o1", "h1", "h2"]


def test_more_prompts_than_there_are_and_splits_without_prompts_are_errors(make: Maker) -> None:
    with pytest.raises(
        DataError, match=r"prompts_per_tag\.lookalike: 1 asked for; the prompt sets hold 0 with this tag"
    ):
        make().select("train", {"lookalike": 1})
    with pytest.raises(DataError, match="no prompts of the split `eval`"):
        make(prompts=PROMPTS[:2]).select("eval", {})


def test_an_id_in_two_files_is_an_error(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"id": "h1", "prompt": "Another text?"}\n')
    with pytest.raises(DataError, match=r"more\.jsonl: the prompt id `h1` stands already in .*prompts\.jsonl"):
        assert two_files(make).prompts


def test_a_text_in_both_splits_is_an_error_and_twice_in_one_is_not(make: Maker, tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text('{"id": "n1", "prompt": "how do I  STEAL a bicycle?", "split": "train"}\n')
    assert len(two_files(make).prompts) == 8
    more.write_text('{"id": "n1", "prompt": "how do I  STEAL a bicycle?", "split": "eval"}\n')
    with pytest.raises(
        DataError, match=r"more\.jsonl: `n1` \(eval\) has the text of `h1` \(train\) in .*prompts\.jsonl"
    ):
        assert two_files(make).prompts


def test_a_broken_prompt_file_is_named_with_its_line(make: Maker, tmp_path: Path) -> None:
    run = make()
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"id": "x", "prompt": "  "}\n{"id": "y", \n')
    with pytest.raises(DataError) as caught:
        assert run.prompts
    lines = str(caught.value).splitlines()
    assert "prompts.jsonl:8: prompt: an empty prompt; text is expected" in lines[0]
    assert "prompts.jsonl:9: not a JSON object" in lines[1]


def test_a_principle_is_drawn_for_the_prompts_tag_or_for_another(make: Maker) -> None:
    run = make()
    ordinary = next(prompt for prompt in run.prompts if prompt.id == "o1")
    assert run.principle_for(ordinary).id == "useful"
    assert run.principle_for(ordinary, tag=HARM).id in ("safe", "lawful")
    categorized = ordinary.model_copy(update={"category": "useful things"})
    assert run.principle_for(categorized, 3, tag=HARM) == run.principle_for(ordinary, 3, tag=HARM)


def test_a_seed_depends_on_the_run_and_on_what_it_is_for(make: Maker) -> None:
    run = make()
    assert run.seed("h1/response", 0) == run.seed("h1/response", 0) == make().seed("h1/response", 0)
    others = {run.seed("h1/response", 1), run.seed("h2/response", 0), make(seed=1).seed("h1/response", 0)}
    assert run.seed("h1/response", 0) not in others and len(others) == 3
    assert all(0 <= run.seed("x", n) < 2**63 for n in range(100))


def test_folders_are_numbered_and_outputs_of_stages_that_did_not_run_are_errors(make: Maker) -> None:
    run = make()
    assert [run.stage_folder(stage).name for stage in ("revise", "evaluate")] == ["1-revise", "6-evaluate"]
    with pytest.raises(
        StageError, match=r"4-reward/adapter: not there yet\. Run the stage `reward` first: rlaif reward"
    ):
        run.output("reward", "adapter")
    folder = run.stage_folder("label")
    folder.mkdir(parents=True)
    assert not run.has_output("label")
    (folder / "manifest.json").write_text("{}")
    assert run.has_output("label") and run.output("label", "manifest.json") == folder / "manifest.json"
    (run.stage_folder("reward")).mkdir()
    (run.stage_folder("reward") / "manifest.json").write_text("{}")
    assert not run.has_output("reward")  # left by another recipe: this one has no such stage


def test_inputs_are_named_and_leave_out_what_changes_no_result(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    run = make()
    before = run.inputs(RewardSection(), SamplingSection(), files={"f": tmp_path / "file"}, other=[1])
    assert list(before) == ["seed", "model", "recipe.reward", "recipe.sampling", "other", "f"]
    ignored: dict[str, Any] = {
        "min_heldout_accuracy": 0.1,
        "allow_weak_reward": True,
        "save_steps": 1,
        "report_to": "x",
    }
    assert run.inputs(RewardSection(**ignored))["recipe.reward"] == before["recipe.reward"]
    assert run.inputs(RewardSection(max_steps=1))["recipe.reward"] != before["recipe.reward"]


def test_the_hash_of_a_folder_is_that_of_its_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    assert path_sha256(folder) == "absent"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    first = path_sha256(folder)
    (folder / "README.md").write_text("x")
    assert path_sha256(folder) == first
    (folder / "adapter_config.json").write_text("{}")
    second = path_sha256(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"other weights")
    assert len({first, second, path_sha256(folder)}) == 3
