"""The shared base as an engine: one role answers, some conversations at a time, others following as they end."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlaif.engines.engine import Answer, Answered, Question
from rlaif.errors import DataError
from rlaif.model import sampling
from rlaif.model.options import option_logprobs
from rlaif.model.roles import SharedBase

ROUNDS = 2  # what is committed together, over what is in work at a time: more means fewer idle places and later commits


class LocalEngine:
    """Answers with one role of the shared base."""

    def __init__(self, base: SharedBase, role: str, *, batch_size: int, adapter: str = ""):
        """Let a role answer.

        Args:
            base: the shared base.
            role: which role answers; ``base`` is the model without an adapter.
            batch_size: conversations in one forward pass.
            adapter: hash of the role's adapter, part of the engine's identity.
        """
        self._base, self._role, self._batch_size = base, role, batch_size
        self._adapter = adapter

    @property
    def identity(self) -> dict[str, Any]:
        """The base's identity and the adapter's hash."""
        return {**self._base.identity, "adapter": self._adapter}

    def batches(self, questions: Sequence[Question]) -> list[list[Question]]:
        """Group questions of the same kind and settings by length.

        Raises:
            DataError: a conversation that does not fit the model's context, with its id and length.
        """
        return batched(questions, self._length, ROUNDS * self._batch_size)

    def _length(self, question: Question) -> int:
        length = len(self._base.tokenizer.prompt(question.messages))
        if length + question.max_new_tokens > self._base.max_length:
            raise DataError(
                f"`{question.item_id}`: {length} prompt tokens and {question.max_new_tokens} new ones; the model's "
                f"context holds {self._base.max_length}. Shorten the prompt, or lower max_new_tokens or few_shot."
            )
        return length

    def answers(self, batches: Sequence[Sequence[Question]]) -> Iterator[Answered]:
        """Answer batches in their order; the answers of a batch come together."""
        for batch in batches:
            yield list(zip(batch, self._answer(batch), strict=True))

    def _answer(self, batch: Sequence[Question]) -> list[Answer]:
        """Answer one batch of questions of the same kind and settings."""
        tokenizer = self._base.tokenizer
        prompts = [tokenizer.prompt(question.messages) for question in batch]
        first = batch[0]
        with self._base.acting_as(self._role):
            if first.options:
                options = [tokenizer.option_ids(option) for option in first.options]
                rows = option_logprobs(self._base, prompts, options, self._batch_size).tolist()
                return [Answer(logprobs=tuple(row), tokens=len(p)) for row, p in zip(rows, prompts, strict=True)]
            samples = sampling.sample(
                self._base,
                prompts,
                max_new_tokens=first.max_new_tokens,
                seeds=[question.seed for question in batch],
                temperature=first.temperature,
                top_p=first.top_p,
                rows=self._batch_size,
            )
        return [Answer(tokenizer.decode(s.ids), s.ended, (), len(s.ids)) for s in samples]


def batched(questions: Sequence[Question], length: Callable[[Question], int], size: int) -> list[list[Question]]:
    """Group questions of the same kind and settings into batches of similar length, the longest first."""
    groups: dict[tuple[Any, ...], list[Question]] = {}
    for question in questions:
        settings = (question.options, question.max_new_tokens, question.temperature, question.top_p)
        groups.setdefault(settings, []).append(question)
    result: list[list[Question]] = []
    for group in groups.values():
        lengths = [length(question) for question in group]
        for batch in sampling.batches_by_length(lengths, size):
            result.append([group[index] for index in batch])
    return result
