"""Requests to the servers of one engine: so many at a time, each tried again while what went wrong may pass.

Up to `concurrency` requests are under way, over all addresses in turn, and results come back in the order in which they
are ready. A new one is sent only when all results before it have been handed over. What may pass (no connection, a
broken answer, HTTP 429 or 5xx) is tried again, later each time.
"""

import asyncio
import itertools
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

from rlaif.endpoints import Endpoint, is_local
from rlaif.engines.replies import Trouble
from rlaif.engines.wire import LONGEST_WAIT, Place, Wire
from rlaif.errors import EngineError

SEED_BITS = 0x7FFFFFFF  # every server takes a seed of 31 bits; some take no more
_FIRST_WAIT = 0.5  # seconds before the second attempt; doubled before each further one
T = TypeVar("T")
Item = TypeVar("Item")


class Asking:
    """Asks one model behind one or several servers.

    Args:
        name: the engine's name in the recipe.
        endpoint: its section there.
        say: takes the lines that a user should see.

    Raises:
        ConfigError: the variable that should hold the key does not.
    """

    pause = staticmethod(asyncio.sleep)  # tests put one here that does not wait
    kept = "All answers so far are stored"  # when an engine gives up

    def __init__(self, name: str, endpoint: Endpoint, say: Callable[[str], None]):
        self._name, self._endpoint, self._say = name, endpoint, say
        self._key = endpoint.key(name)
        self._places = [Place(url) for url in endpoint.addresses]
        self._turn = itertools.count()
        self._problem: EngineError | None = None
        self._waiting: set[asyncio.Task[Any]] = set()
        self._wire: Wire | None = None
        for url in endpoint.addresses if self._key else []:
            if url.startswith("http:") and not is_local(url):
                say(f"  warning: engine `{name}`: the key is sent to {url} without encryption; https keeps it secret.")

    def _results(
        self, items: Iterable[Item], ask: Callable[[Item], Coroutine[Any, Any, T]]
    ) -> Iterator[list[tuple[Item, T]]]:
        """Ask for each item; those that are ready at the same moment come together.

        Raises:
            EngineError: one found no result. Those under way are waited for and handed over first.
        """
        todo = deque(items)
        running: dict[asyncio.Task[T], Item] = {}
        self._problem = None
        with asyncio.Runner() as runner:
            try:
                runner.run(self._open())
                while running or (todo and not self._problem):
                    group = runner.run(self._next(todo, running, ask))
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

    async def _close(self, running: Iterable[asyncio.Task[Any]]) -> None:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if self._wire:
            await self._wire.close()

    async def _next(
        self, todo: deque[Item], running: dict[asyncio.Task[T], Item], ask: Callable[[Item], Coroutine[Any, Any, T]]
    ) -> list[tuple[Item, T]]:
        """Send what may be sent, wait until something is ready, and return all that is."""
        while todo and not self._problem and len(running) < self._endpoint.concurrency:
            item = todo.popleft()
            running[asyncio.create_task(ask(item))] = item
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        group: list[tuple[Item, T]] = []
        for task in done:
            item = running.pop(task)
            try:
                group.append((item, task.result()))
            except asyncio.CancelledError:
                continue  # it was waiting to try again when another one stopped the run
            except EngineError as problem:
                self._problem = self._problem or problem
                for waiting in self._waiting:
                    waiting.cancel()
        return group

    # --- attempts ---------------------------------------------------------------------------------------------------

    async def _request(self, what: str, attempt: Callable[[Place], Awaitable[T]], at: Place | None = None) -> T:
        """Try until there is a result.

        Args:
            what: what it is for, in messages.
            attempt: asks one address once; a `Trouble` may pass.
            at: ask this address only.

        Raises:
            EngineError: no attempt succeeded.
        """
        for number in itertools.count(1):
            place = at or await self._place()
            try:
                result = await attempt(place)
            except Trouble as trouble:
                if not place.failures and number <= self._endpoint.max_retries:
                    self._say(f"  engine `{self._name}` ({place.url}): {trouble}. Trying again.")
                place.rest(trouble.wait)
                if number > self._endpoint.max_retries or self._problem:
                    raise self._error(
                        f"gave no answer to `{what}`; attempt {number} of {number} ({place.url}): {trouble}. "
                        f"{self.kept}; when the server is well again, run the same command again."
                    ) from None
                await self._wait_to_retry(number, place, at)
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

    @property
    def _open_wire(self) -> Wire:
        assert self._wire, "not open"
        return self._wire

    def _error(self, what: str) -> EngineError:
        return EngineError(f"engine `{self._name}` {what}")
