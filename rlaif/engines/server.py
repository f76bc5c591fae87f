"""A server as an engine: OpenAI's chat completions over HTTP, as vLLM, SGLang, llama.cpp and hosted models speak them.

A killed run repeats `concurrency` requests at most (`rlaif.engines.asking`). A request that the server calls wrong is
final for that question, but only if the same server answers a short question of the same kind right after; else it is
no fault of the question, and the run stops.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from rlaif.endpoints import Endpoint
from rlaif.engines.asking import SEED_BITS, Asking
from rlaif.engines.engine import Answer, Answered, Question
from rlaif.engines.replies import chosen, verdict, written
from rlaif.engines.wire import Place, Refusal

VERDICT_TOKENS = 32  # of a short written verdict
T = TypeVar("T")


class _Hopeless(Exception):
    """The server refuses also the shortest request of this kind."""


class ServerEngine(Asking):
    """Asks one model behind one or several servers.

    Args:
        name: the engine's name in the recipe.
        endpoint: its section there.
        chooses: whether it is asked to choose between options.
        say: takes the lines that a user should see.

    Raises:
        ConfigError: the variable that should hold the key does not.
    """

    def __init__(
        self, name: str, endpoint: Endpoint, *, chooses: bool = False, say: Callable[[str], None] = lambda line: None
    ):
        super().__init__(name, endpoint, say)
        self._chooses = chooses
        self._offers_logprobs: bool | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The model and what every request to it holds; neither the addresses nor the key."""
        return self._endpoint.identity(chooses=self._chooses)

    def batches(self, questions: Sequence[Question]) -> list[list[Question]]:
        """Return every question alone: they do not influence each other here."""
        return [[question] for question in questions]

    def answers(self, batches: Sequence[Sequence[Question]]) -> Iterator[Answered]:
        """Answer questions; those that are ready at the same moment come together.

        Raises:
            EngineError: a question found no answer. Those under way are waited for and handed over first.
        """
        questions = (question for batch in batches for question in batch)
        yield from self._results(questions, self._answer)

    # --- one question -----------------------------------------------------------------------------------------------

    async def _answer(self, question: Question) -> Answer:
        try:
            return await (self._choose(question) if question.options else self._write(question))
        except Refusal as refusal:
            return Answer(error=f"the server refused the request: {refusal}")
        except _Hopeless as refusal:
            raise self._error(
                f"refuses every request: {refusal}. Check engines.{self._name}.model, .urls and .extra_body, and how "
                "the server was started; then run the same command again."
            ) from None

    async def _write(self, question: Question) -> Answer:
        limit = question.max_new_tokens
        body = self._body(question, limit, question.temperature, question.top_p)
        return await self._ask(question, body, partial(written, limit=limit, clean=self._clean))

    async def _choose(self, question: Question) -> Answer:
        """Choose by log-probabilities where they are offered, else by a short written verdict, as configured."""
        wanted = self._endpoint.logprobs
        if wanted == "required" or (wanted == "auto" and self._offers_logprobs is not False):
            body = self._body(question, 1, 0.0, 1.0)
            body |= {"logprobs": True, "top_logprobs": self._endpoint.top_logprobs}
            try:
                answer = await self._ask(question, body, partial(chosen, options=question.options))
            except _Hopeless:
                if wanted == "required":
                    raise
                answer = None
            if answer:
                self._offers_logprobs = True
                return answer
            self._without_logprobs()
        body = self._body(question, VERDICT_TOKENS, 0.0, 1.0)
        text = await self._ask(question, body, partial(written, limit=VERDICT_TOKENS, clean=self._clean))
        return verdict(text, question.options)

    def _without_logprobs(self) -> None:
        """Go on without log-probabilities if the recipe allows it."""
        if self._endpoint.logprobs == "required":
            raise self._error(
                f"sends no log-probabilities, which engines.{self._name}.logprobs requires. Use a server that offers "
                "them, such as vLLM, or set `logprobs: auto` to read a written verdict instead."
            )
        if self._offers_logprobs is None:
            self._offers_logprobs = False
            self._say(
                f"  engine `{self._name}`: the server offers no log-probabilities; the letter of a short written "
                "verdict is read instead."
            )

    def _body(self, question: Question, limit: int, temperature: float, top_p: float) -> dict[str, Any]:
        return self._endpoint.extra_body | {
            "model": self._endpoint.model,
            "messages": question.messages,
            "max_tokens": limit,
            "temperature": temperature,
            "top_p": top_p,
            "seed": question.seed & SEED_BITS,
            "stream": False,
        }

    # --- requests ---------------------------------------------------------------------------------------------------

    async def _ask(self, question: Question, body: dict[str, Any], read: Callable[[dict[str, Any]], T]) -> T:
        """Ask until there is a reply that can be read.

        Args:
            question: what it is for.
            body: the request.
            read: takes the answer out of the server's JSON.

        Raises:
            EngineError: no attempt succeeded, or none can.
            Refusal: the server says that this request is wrong, while others are answered.
            _Hopeless: it says so of every request of this kind.
        """
        try:
            return await self._request(question.item_id, partial(self._post, body, read))
        except Refusal as refusal:
            probe = body | {"messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 1}
            await self._probe(question, probe, refusal.place)
            raise

    async def _probe(self, question: Question, body: dict[str, Any], place: Place) -> None:
        try:
            await self._request(question.item_id, partial(self._post, body, bool), place)
        except Refusal as refusal:
            raise _Hopeless(f"{refusal} ({place.url})") from None

    async def _post(self, body: dict[str, Any], read: Callable[[dict[str, Any]], T], place: Place) -> T:
        return read(await self._open_wire.post(place, body))

    def _clean(self, text: str) -> str:
        return self._wire.clean(text) if self._wire else text
