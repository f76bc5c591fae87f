"""One request to one server over HTTP, and what may go wrong with it.

Redirects are not followed, bodies are read up to a limit, an attempt as a whole has a time limit, and the key is taken
out of whatever comes back: a server that repeats the request's headers must not put the key into a run folder.
"""

import asyncio
import email.utils
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx2

from rlaif.endpoints import is_local
from rlaif.engines.replies import Trouble, complaint, parse
from rlaif.errors import EngineError

LONGEST_WAIT = 60.0  # seconds; a server that asks for more is asked again after this
_PASSING = {408, 409, 425, 429}
_SHORTEST_SECRET = 8  # a shorter key, such as "EMPTY", is a placeholder and may stand in any text


@dataclass
class Place:
    """One address of an engine, and how it has been doing."""

    url: str
    failures: int = 0
    free_at: float = 0.0  # by time.monotonic; until then it is left out

    def rest(self, wait: float | None) -> None:
        """Leave the address out for a while, longer after each failure, or for as long as it asked.

        Failures of questions that were under way together count as one.
        """
        now = time.monotonic()
        if self.free_at <= now:
            self.failures += 1
        pause = min(2.0 ** (self.failures - 1), LONGEST_WAIT) if wait is None else wait
        self.free_at = max(self.free_at, now + pause)

    def works(self) -> None:
        """Take note of an answer."""
        self.failures, self.free_at = 0, 0.0


class Refusal(Exception):
    """A server's no to a request: what was asked is wrong, and asking again would not help.

    Args:
        what: what it said, in words that may be shown.
        place: who said it.
    """

    def __init__(self, what: str, place: Place):
        super().__init__(what)
        self.place = place


class Wire:
    """Connections to the addresses of one engine.

    Args:
        name: the engine's name in the recipe, for messages.
        urls: its addresses.
        key: sent as a bearer token.
        key_env: the name of the environment variable that the key came from, for messages.
        connections: how many are kept at most.
        timeout_seconds: for one request as a whole.
        max_bytes: of one response.
    """

    def __init__(
        self,
        name: str,
        urls: Iterable[str],
        *,
        key: str | None,
        key_env: str | None,
        connections: int,
        timeout_seconds: float,
        max_bytes: int,
    ):
        self._name, self._key, self._key_env = name, key, key_env
        self._timeout, self._max_bytes = timeout_seconds, max_bytes
        self._secrets: list[str] = []
        if key and len(key) >= _SHORTEST_SECRET:
            self._secrets = list(dict.fromkeys([key, json.dumps(key)[1:-1], quote(key, safe="")]))
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        # What this machine serves to itself does not go through a proxy.
        self._clients = {
            url: httpx2.AsyncClient(
                limits=limits,
                timeout=httpx2.Timeout(None, connect=min(10.0, timeout_seconds)),
                follow_redirects=False,
                trust_env=not is_local(url),
                verify=url.startswith("https:") or not is_local(url),  # without TLS its certificates need no loading
            )
            for url in urls
        }
        # At their finer levels these loggers write addresses and headers, and a server may send the key back in one.
        for logger in ("httpx2", "httpcore2"):
            logging.getLogger(logger).setLevel(logging.WARNING)

    async def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            await client.aclose()

    def clean(self, text: str) -> str:
        """Take the key out of a text, also where it stands there as JSON or an address would write it."""
        for spelling in self._secrets:
            text = text.replace(spelling, "[key removed]")
        return text

    def _without_key(self, value: Any) -> Any:
        """Take the key out of every text of a JSON value."""
        if isinstance(value, str):
            return self.clean(value)
        if isinstance(value, list):
            return [self._without_key(item) for item in value]
        if isinstance(value, dict):
            return {self.clean(name): self._without_key(item) for name, item in value.items()}
        return value

    async def post(self, place: Place, body: dict[str, Any], path: str = "chat/completions") -> dict[str, Any]:
        """Ask for a completion and return the server's JSON; errors as in `tell`."""
        response, data = await self._send(place, body, path)
        kind = response.headers.get("content-type", "")
        if "json" not in kind.lower():
            shown = ascii(self.clean(kind))[1:-1]
            raise Trouble(f"an answer of the content type `{shown:.60}` came; JSON is expected")
        reply: dict[str, Any] = self._without_key(parse(data)) if self._secrets else parse(data)
        return reply

    async def tell(self, place: Place, body: dict[str, Any], path: str) -> None:
        """Post what the server answers by its status alone.

        Raises:
            Trouble: the attempt failed and another may succeed.
            Refusal: the server says that the request is wrong.
            EngineError: no request to this address can succeed: a wrong key, a redirect.
        """
        await self._send(place, body, path)

    async def _send(self, place: Place, body: dict[str, Any], path: str) -> tuple[httpx2.Response, bytes]:
        """Post JSON and return what came with the status 200."""
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        content = json.dumps(body, allow_nan=False).encode()
        url = f"{place.url}/{path}"
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._clients[place.url].stream("POST", url, content=content, headers=headers) as response,
            ):
                data = await self._read(response)
        except TimeoutError:
            raise Trouble(f"no answer within {self._timeout:g} seconds") from None
        except (httpx2.HTTPError, httpx2.StreamError, OSError) as problem:
            kind = type(problem).__name__
            words = " ".join(self.clean(str(problem)).split())[:200]
            raise Trouble(f"{kind}: {words}" if words else kind) from None
        self._check(place, response, data)
        return response, data

    async def _read(self, response: httpx2.Response) -> bytes:
        data = bytearray()
        async for part in response.aiter_bytes():
            data += part
            if len(data) > self._max_bytes:
                raise Trouble(f"its answer is longer than max_response_bytes = {self._max_bytes}")
        return bytes(data)

    def _check(self, place: Place, response: httpx2.Response, data: bytes) -> None:
        status = response.status_code
        if status == 200:
            return
        said = f"HTTP {status}: {complaint(data, self.clean)}"
        if status in _PASSING or status >= 500 or 200 <= status < 300:
            raise Trouble(said, _wait(response.headers.get("retry-after")))
        if status in (401, 402, 403, 407):
            advice = (
                f"The key came from the environment variable `{self._key_env}`; check it, and what it may be used for."
                if self._key
                else f"No key was sent; name the variable that holds one in engines.{self._name}.api_key_env."
            )
            raise EngineError(f"engine `{self._name}` ({place.url}): {said}. {advice} Then run again.")
        if status < 400:
            raise EngineError(
                f"engine `{self._name}` ({place.url}): HTTP {status}: the server sends on to another address, which is "
                f"not followed. Put the final address into engines.{self._name}.urls."
            )
        raise Refusal(said, place)


def _wait(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, in either of its forms, at most `LONGEST_WAIT`."""
    if header is None:
        return None
    try:
        seconds = float(header) if header.strip().isdigit() else _until(header)
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), LONGEST_WAIT)


def _until(date: str) -> float:
    return email.utils.parsedate_to_datetime(date).timestamp() - time.time()
