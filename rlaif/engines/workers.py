"""What runs in a worker of the engine `ray`: the local engine, and the JSON in which questions and answers travel."""

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

from rlaif.engines.engine import Answer, Engine, Question
from rlaif.engines.local import LocalEngine
from rlaif.errors import DataError, DeviceError, EngineError, RlaifError
from rlaif.model.base import default_device
from rlaif.model.roles import BASE, SharedBase
from rlaif.recipe import ModelSection


def packed(questions: Sequence[Question]) -> str:
    """Return questions as JSON."""
    return json.dumps([asdict(question) for question in questions])


def unpacked(result: str) -> list[Answer]:
    """Return the answers in a worker's JSON.

    Raises:
        EngineError: the worker could not answer.
    """
    found = json.loads(result)
    if "problem" in found:
        raise EngineError(f"engine `ray`: on the machine {found['machine']}: {found['problem']}")
    return [Answer(**{**answer, "logprobs": tuple(answer["logprobs"])}) for answer in found["answers"]]


class Worker:
    """A copy of the model in a process of its own, which Ray starts."""

    def __init__(self, task: str):
        """Load nothing yet: a model that cannot be loaded must become a row, and not a worker that cannot start."""
        self._task = json.loads(task)

    def __call__(self, rows: dict[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        """Answer the batches in the rows."""
        return {"number": rows["number"], "result": [self._result(questions) for questions in rows["questions"]]}

    def _result(self, questions: str) -> str:
        try:
            rows = [Question(**{**row, "options": tuple(row["options"])}) for row in json.loads(questions)]
            return json.dumps({"answers": [asdict(answer) for answer in answered(self._engine, rows)]})
        except RlaifError as problem:
            return json.dumps({"problem": str(problem), "machine": socket.gethostname()})

    @cached_property
    def _engine(self) -> LocalEngine:
        """Load the model, and see that it is the one that the answers are stored under."""
        wanted: dict[str, Any] = self._task["identity"]
        if wanted["device"] == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that the worker has not asked for
        if default_device().type != wanted["device"]:
            raise DeviceError(
                "there is no NVIDIA GPU that torch can use, and ray.gpus_per_worker asks for one. Install a build of "
                "torch for GPUs there, or set ray.gpus_per_worker to 0."
            )
        settings = ModelSection.model_validate(self._task["model"])
        base = SharedBase.load(settings)
        name = wanted["model"]
        differs = sorted(key for key, value in base.identity.items() if key != "model" and value != wanted[key])
        if differs:
            raise EngineError(
                f"the model `{name}` is another one than where the run was started (its {', '.join(differs)} differ). "
                "Put the same files there, or into a folder that all machines share."
            )
        return LocalEngine(base, BASE, batch_size=self._task["batch_size"])


def answered(engine: Engine, questions: Sequence[Question]) -> list[Answer]:
    """Let an engine answer questions; those that do not fit the model get an answer that says so."""
    found: dict[int, Answer] = {}
    for question in questions:
        try:
            engine.batches([question])
        except DataError as problem:
            found[id(question)] = Answer(error=str(problem))
    good = [question for question in questions if id(question) not in found]
    for group in engine.answers(engine.batches(good)):
        found |= {id(question): answer for question, answer in group}
    return [found[id(question)] for question in questions]
