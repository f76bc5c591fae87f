"""A server as an engine: OpenAI's chat completions over HTTP, as vLLM, SGLang, llama.cpp and hosted models speak them.

Up to `concurrency` questions are under way at a time, over all addresses in turn, and answers come back in the order in
which they are ready. A question is sent only when all that came before has been handed over, so a killed run repeats
`concurrency` requests at most. What may pass (no connection, a broken answer, HTTP 429 or 5xx) is tried again, later
each time. A request that the server calls wrong is final for that question, but only if the same server answers a
short question of the same kind right after; else it is no fault of the question, and the run stops.
"""

import asyncio
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from rlaif.endpoints import Endpoint, is_local
from rlaif.engines.engine import Answer, Answered, Question
from rlaif.engines.replies import Trouble, chosen, verdict, written
from rlaif.engines.wire import LONGEST_WAIT, Place, Refusal, Wire
from rlaif.errors import EngineError

VERDICT_TOKENS = 32  # of a short written verdict
_FIRST_WAIT = 0.5  # seconds before the second attempt; doubled before each further one
_SEED_BITS = 0x7FFFFFFF  # every server takes a seed of 31 bits; some take no more
T = TypeVar("T")


class _Hopeless(Exception):
    """The server refuses also the shortest request of this kind."""


class ServerEngine:
    """Asks one model behind one or several servers.

    Args:
        name: the engine's name in the recipe.
        endpoint: its section there.
        chooses: whether it is asked to choose between options.
        say: takes the lines that a user should see.

    Raises:
        ConfigError: the variable that should hold the key does not.
    """

    pause = staticmethod(asyncio.sleep)  # tests put one here that does not wait

    def __init__(
        self, name: str, endpoint: Endpoint, *, chooses: bool = False, say: Callable[[str], None] = lambda line: None
    ):
        self._name, self._endpoint, self._chooses, self._say = name, endpoint, chooses, say
        self._key = endpoint.key(name)
        self._places = [Place(url) for url in endpoint.addresses]
        self._turn = itertools.count()
        self._offers_logprobs: bool | None = None
        self._problem: EngineError | None = None
        self._waiting: set[asyncio.Task[Any]] = set()
        self._wire: Wire | None = None
        for url in endpoint.addresses if self._key else []:
            if url.startswith("http:") and not is_local(url):
                say(f"  warning: engine `{name}`: the key is sent to {url} without encryption; https keeps it secret.")

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
        todo = deque(question for batch in batches for question in batch)
        running: dict[asyncio.Task[Answer], Question] = {}
        self._problem = None
        with asyncio.Runner() as runner:
            try:
                runner.run(self._open())
                while running or (todo and not self._problem):
                    group = runner.run(self._next(todo, running))
                    if group:
                        yield group
                if self._problem:
                    raise self._problem
            finally:
                runner.run(self._close(running))

    async def _open(self) -> None:
        settings = self._endpoint
        self._wire = Wire(
            self._name,
            settings.addresses,
            key=self._key,
            key_env=settings.api_key_env,
            connections=settings.concurrency,
            timeout_seconds=settings.timeout_seconds,
            max_bytes=settings.max_response_bytes,
        )

    async def _close(self, running: dict[asyncio.Task[Answer], Question]) -> None:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if self._wire:
            await self._wire.close()

    async def _next(self, todo: deque[Question], running: dict[asyncio.Task[Answer], Question]) -> Answered:
        """Send what may be sent, wait until something is ready, and return all that is."""
        while todo and not self._problem and len(running) < self._endpoint.concurrency:
            question = todo.popleft()
            running[asyncio.create_task(self._answer(question))] = question
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        group: Answered = []
        for task in done:
            question = running.pop(task)
            try:
                group.append((question, task.result()))
            except asyncio.CancelledError:
                continue  # it was waiting to try again when another question stopped the run
            except EngineError as problem:
                self._problem = self._problem or problem
                for waiting in self._waiting:
                    waiting.cancel()
        return group

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
        return await self._request(question, body, partial(written, limit=limit, clean=self._clean))

    async def _choose(self, question: Question) -> Answer:
        """Choose by log-probabilities where they are offered, else by a short written verdict, as configured."""
        wanted = self._endpoint.logprobs
        if wanted == "required" or (wanted == "auto" and self._offers_logprobs is not False):
            body = self._body(question, 1, 0.0, 1.0)
            body |= {"logprobs": True, "top_logprobs": self._endpoint.top_logprobs}
            try:
                answer = await self._request(question, body, partial(chosen, options=question.options))
            except _Hopeless:
                if wanted == "required":
                    raise
                answer = None
            if answer:
                self._offers_logprobs = True
                return answer
            self._without_logprobs()
        body = self._body(question, VERDICT_TOKENS, 0.0, 1.0)
        text = await self._request(question, body, partial(written, limit=VERDICT_TOKENS, clean=self._clean))
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
            "seed": question.seed & _SEED_BITS,
            "stream": False,
        }

    # --- attempts ---------------------------------------------------------------------------------------------------

    async def _request(
        self, question: Question, body: dict[str, Any], read: Callable[[dict[str, Any]], T], at: Place | None = None
    ) -> T:
        """Ask until there is a reply that can be read.

        Args:
            question: what it is for.
            body: the request.
            read: takes the answer out of the server's JSON.
            at: ask this address only; a probe of whether it answers at all.

        Raises:
            EngineError: no attempt succeeded, or none can.
            Refusal: the server says that this request is wrong, while others are answered.
            _Hopeless: it says so of every request of this kind.
        """
        assert self._wire, "not open"
        for attempt in itertools.count(1):
            place = at or await self._place()
            try:
                result = read(await self._wire.post(place, body))
            except Trouble as trouble:
                if not place.failures and attempt <= self._endpoint.max_retries:
                    self._say(f"  engine `{self._name}` ({place.url}): {trouble}. Trying again.")
                place.rest(trouble.wait)
                if attempt > self._endpoint.max_retries or self._problem:
                    raise self._error(
                        f"gave no answer to `{question.item_id}`; attempt {attempt} of {attempt} ({place.url}): "
                        f"{trouble}. All answers so far are stored; when the server is well again, run the same "
                        "command again."
                    ) from None
                await self._wait_to_retry(attempt, place, at)
            except Refusal as refusal:
                if at:
                    raise _Hopeless(f"{refusal} ({place.url})") from None
                probe = body | {"messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 1}
                await self._request(question, probe, lambda reply: None, place)
                raise
            else:
                place.works()
                return result
        raise AssertionError("unreachable")

    async def _place(self) -> Place:
        """Return the next address in turn that is not left out; where all are, wait for the first to come back."""
        ready = self._ready()
        if ready:
            return ready[next(self._turn) % len(ready)]
        first = min(self._places, key=lambda place: place.free_at)
        await self._pause(first.free_at - time.monotonic())
        return first

    def _ready(self) -> list[Place]:
        now = time.monotonic()
        return [place for place in self._places if place.free_at <= now]

    async def _wait_to_retry(self, attempt: int, failed: Place, at: Place | None) -> None:
        """Wait twice as long as before the last attempt, unless another address can be asked at once."""
        seconds = min(_FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
        if at:
            seconds = max(seconds, at.free_at - time.monotonic())
        elif any(place is not failed for place in self._ready()):
            return
        await self._pause(seconds)

    async def _pause(self, seconds: float) -> None:
        """Wait, a little longer than said, so that not all questions come back at once."""
        task = asyncio.current_task()
        assert task, "outside of a task"
        self._waiting.add(task)
        try:
            await self.pause(max(seconds, 0.0) * random.uniform(1.0, 1.25))
        finally:
            self._waiting.discard(task)

    def _clean(self, text: str) -> str:
        return self._wire.clean(text) if self._wire else text

    def _error(self, what: str) -> EngineError:
        return EngineError(f"engine `{self._name}` {what}")
