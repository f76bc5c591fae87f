"""What a request to the scorer means, and the one thread that scores: bodies in, answers out.

Answers are in the forms that OpenRLHF (``/get_reward``) and verl (``/classify`` and ``/v1/embeddings``) read; see
`rlaif.reward_server` for the way in.
"""

import hmac
import ipaddress
import json
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from email.message import Message
from typing import Any, NoReturn, Protocol

from rlaif.errors import DataError, RlaifError
from rlaif.model.groups import Group
from rlaif.records import Messages
from rlaif.scoring import Score
from rlaif.stages.reward_model import RewardModel, encode_group
from rlaif.transcripts import Unusable, conversation

MAX_BODY_BYTES = 16 << 20
MAX_ITEMS = 1024
MAX_WAITING = 256  # requests
ANSWER_SECONDS = 170.0  # OpenRLHF waits 180
DRAIN_SECONDS = 10.0
_PATHS = ("/get_reward", "/classify", "/v1/embeddings")


class Scores(Protocol):
    """What scores groups; see `rlaif.scoring.Scorer`."""

    model: RewardModel
    batch_size: int

    @property
    def max_length(self) -> int:
        """How many tokens a conversation may have."""
        ...

    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        """Score the answers of each group."""
        ...


class Refused(Exception):
    """A request that is not served: the HTTP status and the reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Batches:
    """One thread that scores what is waiting, whoever has asked for it; nothing else touches the model."""

    def __init__(self, scorer: Scores):
        self._scorer = scorer
        self._waiting: queue.Queue[tuple[list[Group], Future[list[float]]] | None] = queue.Queue(MAX_WAITING)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def score(self, groups: list[Group]) -> list[float]:
        """Return a score for each group of one answer.

        Raises:
            Refused: the model is too slow for what waits before, or it failed.
        """
        future: Future[list[float]] = Future()
        if not self.thread.is_alive():
            raise Refused(503, "the server is stopping")
        try:
            self._waiting.put_nowait((groups, future))
        except queue.Full:
            raise Refused(503, "too many requests are waiting; try again later") from None
        try:
            return future.result(ANSWER_SECONDS)
        except Late:
            future.cancel()
            raise Refused(503, f"no score within {ANSWER_SECONDS:.0f} s; send fewer items at a time") from None
        except (RuntimeError, RlaifError) as problem:
            raise Refused(500, f"the model failed: {' '.join(str(problem).split())[:200]}") from None

    def stop(self) -> None:
        """Let the thread end after what it is doing."""
        self._waiting.put(None)
        self.thread.join(DRAIN_SECONDS)

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            jobs, stop = [first], False
            while not stop and sum(len(groups) for groups, _ in jobs) < self._scorer.batch_size:
                try:
                    following = self._waiting.get_nowait()
                except queue.Empty:
                    break
                stop = following is None
                jobs += [following] if following else []
            self._score([job for job in jobs if job[1].set_running_or_notify_cancel()])
            if stop:
                return

    def _score(self, jobs: list[tuple[list[Group], Future[list[float]]]]) -> None:
        problem: Exception = RuntimeError("the thread that scores has ended")
        try:
            found = iter(self._scorer.score([group for groups, _ in jobs for group in groups]))
            for groups, future in jobs:
                future.set_result([next(found)[0].score for _ in groups])
        except (RuntimeError, RlaifError) as failure:  # out of memory, for one: this batch fails, the server goes on
            problem = failure
        finally:  # after anything else, which is a bug, the thread ends; nobody shall wait for it
            for _, future in jobs:
                if not future.done():
                    future.set_exception(problem)


class Service:
    """What a request means, apart from how it came: requests in, a status and an answer out."""

    def __init__(self, scorer: Scores, *, name: str, key: str | None = None, hosts: Sequence[str] = ()):
        """Serve a model.

        Args:
            scorer: the model.
            name: its name, for answers.
            key: what ``Authorization: Bearer`` must hold; None: nothing is asked for.
            hosts: further names by which this machine may be called.
        """
        self._scorer, self._name, self._key = scorer, name, key
        self._hosts = {"localhost", *(host.lower() for host in hosts)}
        self.batches = Batches(scorer)

    def admit(self, method: str, path: str, headers: Mapping[str, str] | Message) -> int:
        """Look at a request before its body is read; return the size of the body.

        Raises:
            Refused: see the module.
        """
        host = headers.get("Host", "")
        if not self._is_allowed(host):
            raise Refused(400, f"the Host {host[:100]!r} is not allowed; --allow-host of the server allows it")
        if headers.get("Origin") is not None:
            raise Refused(403, "requests from web pages are not served")
        if method == "GET" and path == "/health":
            return 0
        if path not in _PATHS:
            raise Refused(404, f"no such path; there are GET /health and POST {', '.join(_PATHS)}")
        if method != "POST":
            raise Refused(405, "POST is expected here")
        given = headers.get("Authorization", "")
        if self._key is not None and not hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode()):
            raise Refused(401, "the header `Authorization: Bearer ...` is missing or holds another key")
        if headers.get("Content-Type", "").split(";")[0].strip().lower() != "application/json":
            raise Refused(415, "Content-Type: application/json is expected")
        size = headers.get("Content-Length", "")
        if headers.get("Transfer-Encoding") is not None or not (size.isascii() and size.isdigit()):
            raise Refused(411, "a body with a Content-Length is expected")
        if len(size) > 12 or int(size) > MAX_BODY_BYTES:
            raise Refused(413, f"a body of at most {MAX_BODY_BYTES} bytes is expected; send fewer items at a time")
        return int(size)

    def _is_allowed(self, host: str) -> bool:
        """Tell whether a Host is an address, which no page can rebind, or an allowed name."""
        name = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name.lower() in self._hosts
        return True

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """Return the answer to an admitted request.

        Raises:
            Refused: the body is not what the path expects, or the model cannot score it now.
        """
        if path == "/health":
            if not self.batches.thread.is_alive():
                raise Refused(503, "the thread that scores has ended")
            return {"status": "ok", "model": self._name}
        data = _object(body)
        if path == "/get_reward":
            scores = self._score(data, "query", "prompts")
            return {"rewards": scores, "scores": scores, "extra_logs": {}}
        if data.get("use_activation") or data.get("activation"):
            raise Refused(400, "`use_activation`: scores are given as they are; set it to false")
        scores = self._score(data, "input", "")
        if path == "/classify":
            rows = [
                {"index": index, "label": "LABEL_0", "probs": [score], "num_classes": 1}
                for index, score in enumerate(scores)
            ]
        else:
            rows = [{"object": "embedding", "index": index, "embedding": [score]} for index, score in enumerate(scores)]
        return {"object": "list", "model": self._name, "data": rows, "created": int(time.time())}

    def _score(self, data: dict[str, Any], key: str, prompts_key: str) -> list[float]:
        items, prompts = data.get(key), data.get(prompts_key) or []
        if isinstance(items, str) or (isinstance(items, list) and items and isinstance(items[0], dict)):
            items = [items]  # one text, or one conversation
        if not isinstance(items, list) or not 0 < len(items) <= MAX_ITEMS:
            raise Refused(400, f"`{key}`: a list of 1 to {MAX_ITEMS} conversations is expected")
        if not isinstance(prompts, list) or (prompts and len(prompts) != len(items)):
            raise Refused(400, f"`{prompts_key}`: a list as long as `{key}` is expected")
        groups = []
        for index, item in enumerate(items):
            prompt = prompts[index] if prompts and isinstance(prompts[index], str) else ""
            try:
                groups.append(self._group(item, prompt))
            except (Unusable, RlaifError) as reason:
                raise Refused(400, f"`{key}` {index}: {reason}") from None
        return self.batches.score(groups)

    def _group(self, item: Any, prompt: str) -> Group:
        """Encode one conversation, a text or a list of turns."""
        model = self._scorer.model
        if isinstance(item, str):
            before, answer = model.base.tokenizer.rendered(item, prompt)
            group = Group(before, [answer])
        else:
            turns: Messages = conversation(item)
            if len(turns) < 2 or turns[-1]["role"] != "assistant":
                raise Unusable("the last of at least two turns must be the assistant's")
            group = encode_group(model, turns[:-1], [turns[-1:]])
        tokens = len(group.prompt) + len(group.responses[0])
        if tokens > self._scorer.max_length:
            raise DataError(f"{tokens} tokens; the model's context holds {self._scorer.max_length}")
        return group


def _object(body: bytes) -> dict[str, Any]:
    """Read a body as a JSON object of Unicode texts and finite numbers."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        data = json.loads(body.decode("utf-8"), parse_constant=refuse)
        json.dumps(data, ensure_ascii=False).encode()  # refuses half of a surrogate pair
    except (ValueError, RecursionError) as problem:  # the former also: bytes that are not UTF-8
        raise Refused(400, f"the body is not readable as JSON: {str(problem)[:200]}") from None
    if not isinstance(data, dict):
        raise Refused(400, "the body is JSON, but no object")
    return data
