"""Responses for training from vLLM servers, into which adapters are loaded while they run.

An adapter is a folder that the server reads from its own disk (``POST /v1/load_lora_adapter``). Prompts go out and
responses come back as token ids with the log-probabilities they were sampled with (``POST /v1/completions``), so
nothing is tokenized twice. A server's defaults come from the model's ``generation_config.json``, which may filter or
penalize tokens: every setting that changes the distribution is sent. A response ends at this package's own end tokens,
which are among its ids, and nowhere else.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rlaif.engines.asking import SEED_BITS, Asking
from rlaif.engines.replies import Trouble, first_choice
from rlaif.engines.wire import Place, Refusal
from rlaif.model.sampling import Sample

_RANK = "max_lora_rank"
_NOT_FOUND = "No adapter found"
_ALREADY = "already been loaded"  # by an attempt whose answer was lost: nobody else uses these names
_START = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment and --enable-lora"


class Drawing(NamedTuple):
    """How responses are drawn.

    Attributes:
        max_new_tokens: length at which a response is cut.
        temperature: logits are divided by it.
        end_ids: tokens that end a response.
        vocabulary: how many tokens the model has.
    """

    max_new_tokens: int
    temperature: float
    end_ids: Sequence[int]
    vocabulary: int


class RolloutEngine(Asking):
    """Samples with adapters on the servers of one engine."""

    kept = "The newest checkpoint is kept"

    def hasty(self) -> "RolloutEngine":
        """Return one that tries everything once, and says nothing."""
        return RolloutEngine(self._name, self._endpoint.model_copy(update={"max_retries": 0}), lambda line: None)

    def load(self, name: str, folder: Path) -> None:
        """Let every server read an adapter folder and offer it as a model of this name.

        Raises:
            EngineError: a server cannot be reached, does not load adapters, or not this one.
        """
        list(self._results(self._places, partial(self._load, name, folder)))

    def unload(self, name: str) -> None:
        """Let every server forget an adapter; that it does not know it is no error.

        Raises:
            EngineError: a server cannot be reached.
        """
        list(self._results(self._places, partial(self._unload, name)))

    def sample(
        self, model: str | None, prompts: Sequence[Sequence[int]], seeds: Sequence[int], drawing: Drawing
    ) -> list[Sample]:
        """Draw one response to each prompt.

        Args:
            model: the name of a loaded adapter; None: the served model itself.
            prompts: token ids.
            seeds: one a prompt, of which a server gets 31 bits.
            drawing: how.

        Returns:
            One `Sample` a prompt; `logprobs` are as the servers say.

        Raises:
            EngineError: no answer, a refusal, or one that does not come from the model here.
        """
        found: dict[int, Sample] = {}
        bodies = [
            self._endpoint.extra_body | _body(model or self._endpoint.model, ids, seed, drawing)
            for ids, seed in zip(prompts, seeds, strict=True)
        ]
        for group in self._results(range(len(bodies)), lambda row: self._draw(row, bodies[row], drawing)):
            found |= dict(group)
        return [found[row] for row in range(len(bodies))]

    # --- one request ------------------------------------------------------------------------------------------------

    async def _load(self, name: str, folder: Path, at: Place) -> None:
        async def attempt(place: Place) -> None:
            body = {"lora_name": name, "lora_path": str(folder)}
            try:
                await self._open_wire.tell(place, body, "load_lora_adapter")
            except Trouble as trouble:  # vLLM calls also what is wrong with an adapter an error of its own
                if _RANK in str(trouble) or _NOT_FOUND in str(trouble):
                    raise Refusal(str(trouble), place) from None
                raise

        try:
            await self._request(name, attempt, at)
        except Refusal as refusal:
            if _ALREADY not in str(refusal):
                raise self._error(
                    f"({at.url}) does not load the adapter in {folder}: {refusal}. {_advice(str(refusal))}"
                ) from None

    async def _unload(self, name: str, at: Place) -> None:
        async def attempt(place: Place) -> None:
            await self._open_wire.tell(place, {"lora_name": name}, "unload_lora_adapter")

        try:
            await self._request(name, attempt, at)
        except Refusal:  # it does not have it
            return

    async def _draw(self, row: int, body: dict[str, Any], drawing: Drawing) -> Sample:
        async def attempt(place: Place) -> Sample:
            return self._read(await self._open_wire.post(place, body, "completions"), drawing)

        try:
            return await self._request(f"prompt {row + 1}", attempt)
        except Refusal as refusal:
            raise self._error(
                f"({refusal.place.url}) does not sample from `{body['model']}`: {refusal}. If it does not know the "
                "name, several processes take its requests and only one of them has loaded the adapter: start it with "
                f"one (--api-server-count 1). Else check --max-model-len and engines.{self._name}.extra_body."
            ) from None

    def _read(self, reply: dict[str, Any], drawing: Drawing) -> Sample:
        """Take the response out of a completion.

        Raises:
            Trouble: it has not the documented form, or was broken off.
            EngineError: the server does not do what was asked, or has another model.
        """
        choice = first_choice(reply)
        if choice.get("finish_reason") in ("abort", "error"):
            raise Trouble("it broke off its answer")
        if choice.get("token_ids") is None:
            raise self._error("sends no token ids (`return_token_ids`); vLLM of at least version 0.10.2 is expected.")
        ids, logprobs = choice["token_ids"], _logprobs_of(choice)
        whole = isinstance(ids, list) and all(type(token) is int for token in ids)
        if not whole or not 0 < len(ids) <= drawing.max_new_tokens or len(ids) != len(logprobs):
            raise Trouble("its token ids and their log-probabilities have another form than documented")
        strange = next((token for token in ids if not 0 <= token < drawing.vocabulary), None)
        if strange is not None:
            raise self._error(
                f"wrote the token {strange}, and the model here has {drawing.vocabulary}: it serves another model. "
                "Serve the recipe's model."
            )
        ended = ids[-1] in drawing.end_ids
        if not ended and len(ids) < drawing.max_new_tokens:
            raise self._error(
                f"ended a response after {len(ids)} of {drawing.max_new_tokens} tokens at token {ids[-1]}, which is no "
                f"end token of the model here ({', '.join(map(str, drawing.end_ids))}). Check that it serves the "
                "recipe's model, and raise --max-model-len."
            )
        if any(token in drawing.end_ids for token in ids[:-1]):
            raise self._error("goes on after an end token, though `stop_token_ids` names it; vLLM is expected.")
        return Sample(ids, logprobs, ended)


def _body(model: str, ids: Sequence[int], seed: int, drawing: Drawing) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(ids),
        "seed": seed & SEED_BITS,
        "max_tokens": drawing.max_new_tokens,
        "temperature": drawing.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,  # the server's own idea of the end; ours follows
        "stop_token_ids": list(drawing.end_ids),
        "logprobs": 0,  # of the sampled token alone
        "return_token_ids": True,
        "stream": False,
    }


def _logprobs_of(choice: dict[str, Any]) -> list[float]:
    listed = choice["logprobs"].get("token_logprobs") if isinstance(choice.get("logprobs"), dict) else None
    for value in listed if isinstance(listed, list) else [None]:
        if isinstance(value, bool) or not isinstance(value, int | float) or value > 1e-3:  # rounding lifts it above 0
            raise Trouble("it sent no log-probabilities of its tokens")
    return [min(float(value), 0.0) for value in listed or []]


def _advice(said: str) -> str:
    if _RANK in said:
        return (
            "Start the server with a --max-lora-rank (1, 8, 16, 32, 64, 128, 256, 320 or 512) that is at least the "
            "adapter's rank."
        )
    if _NOT_FOUND in said:
        return "The server must see the run folder at the same path: run it on this machine, or share the folder."
    return f"Start the server with {_START}."
