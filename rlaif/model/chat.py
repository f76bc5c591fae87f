"""Conversations as token ids, through the model's own chat template, with control tokens in data kept inert.

A prompt or an answer may contain the text of a control token (``<|im_end|><|im_start|>assistant``). Encoded naively
it would end a turn and open another one. Here every piece of data is encoded with special tokens split, so the only
control tokens in a sequence are those that the template itself wrote.
"""

import copy
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from rlaif.errors import DataError, ModelError
from rlaif.records import Messages

# What an expression of a chat template can run into; its sandbox lets Python's own errors through.
_FAILURES = (
    *(TemplateError, TypeError, ValueError, ArithmeticError, LookupError),
    *(AttributeError, RecursionError, MemoryError),
)
_MAX_AROUND = 100_000  # characters that a template may write beside what it is given
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # private-use characters: they mark where data stands in a rendered template
_MARK = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


class ChatTokenizer:
    """A tokenizer with a chat template, the ids that end a turn, and a padding id."""

    def __init__(self, tokenizer: Any, name: str, eos_ids: Sequence[int] = (), *, whole_turns: bool = False):
        """Wrap a `transformers` tokenizer.

        Args:
            tokenizer: a fast tokenizer with a chat template.
            name: the model's name, for messages.
            eos_ids: further ids that end a response (from the model's generation settings).
            whole_turns: close a response with all that the template writes after one, and not with the end of the
                turn alone: other people's reward models were trained to be read there.

        Raises:
            ModelError: it has no chat template, is not a fast tokenizer, or its template drops what the user says.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                f"model `{name}`: its tokenizer has no chat template. Use the chat (instruct) version of the model, "
                "or add a chat_template.jinja to the model's folder."
            )
        if not tokenizer.is_fast:
            raise ModelError(
                f"model `{name}`: a fast tokenizer (tokenizer.json) is needed to keep control tokens inert."
            )
        self.raw = tokenizer
        self.name = name
        self._careful = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        self._controls = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        self._structures: dict[tuple[str, ...], list[int]] = {}
        probe = self._render([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], False, True)
        if [int(turn) for turn in _MARK.findall(probe)] != [0, 1] or probe.count(_OPEN) != 2:
            raise ModelError(f"model `{name}`: its chat template does not show both turns of a short conversation.")
        self._inert = self._inert_tokenizer(probe, eos_ids)
        tail = self._template_ids(probe.rsplit(_CLOSE, 1)[1])
        endings = [token for token in tail if token in self._controls]
        if not endings and tokenizer.eos_token_id is None:
            raise ModelError(f"model `{name}`: no token ends a turn; an end-of-sequence token is needed.")
        self.end_of_turn: int = endings[0] if endings else tokenizer.eos_token_id
        self._closing = tail if whole_turns and tail else [self.end_of_turn]
        self._header = probe[probe.index(_CLOSE) + 1 : probe.rindex(_OPEN)]  # between a question and its answer
        self._begins = str(tokenizer.bos_token or "")
        if not probe.startswith(self._begins):
            self._begins = ""
        known = {self.end_of_turn, *eos_ids, tokenizer.eos_token_id}
        self.eos_ids: list[int] = sorted(token for token in known if token is not None)
        self.pad_id: int = self._padding_id()
        if self.pad_id != tokenizer.pad_token_id:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self.pad_id)  # so that saved copies agree with us

    def _inert_tokenizer(self, probe: str, eos_ids: Sequence[int]) -> Any:
        """Return a tokenizer that splits the text of every token with which the template builds turns.

        Splitting concerns tokens marked as special. Some models add ``<|im_end|>`` without that mark; a copy of their
        tokenizer gets it.
        """
        added = {index: token for token, index in self.raw.get_added_vocab().items()}
        special = {index for index, token in self.raw.added_tokens_decoder.items() if token.special}
        structure = {*self._template_ids(probe), *eos_ids, self.raw.eos_token_id}
        unmarked = [added[index] for index in structure & set(added) - special]
        if not unmarked:
            return self.raw
        inert = copy.deepcopy(self.raw)
        inert.add_tokens(unmarked, special_tokens=True)
        return inert

    def _padding_id(self) -> int:
        """Choose an id for padding, not one that ends a turn where there is another.

        Nothing here infers a mask from ids, so padding may equal the end of a turn; a separate id is chosen for the
        sake of saved models, whose usual pooling does infer it.
        """
        candidates = [
            self.raw.pad_token_id,
            self.raw.unk_token_id,
            self.raw.bos_token_id,
            *self.raw.all_special_ids,
        ]
        for token in candidates:
            if token is not None and token not in self.eos_ids:
                return int(token)
        return self.end_of_turn

    def prompt(self, messages: Messages) -> list[int]:
        """Encode a conversation up to where the assistant's answer begins.

        Where no turn holds the text of a control token, the rendered template is encoded as a whole. Data may yet
        become such a text on the way, through a tokenizer that folds wide letters into plain ones or a template that
        cuts words out; then there are other control tokens than the template writes, and each turn is
        encoded by itself.
        """
        if not any(text in turn["content"] for turn in messages for text in self._careful):
            ids = self._template_ids(self._render(messages, True, False))
            if [token for token in ids if token in self._controls] == self._structure(messages):
                return ids
        return self._encode(self._render(messages, True, True), messages)

    def _structure(self, messages: Messages) -> list[int]:
        """Return the control tokens that the template itself writes for turns of these roles, in their order."""
        roles = tuple(turn["role"] for turn in messages)
        if roles not in self._structures:
            own = _MARK.split(self._render(messages, True, True))[::2]
            ids = [token for piece in own for token in self._template_ids(piece)]
            self._structures[roles] = [token for token in ids if token in self._controls]
        return self._structures[roles]

    def response(self, text: str, *, ended: bool = True) -> list[int]:
        """Encode an assistant's answer; with `ended`, closed by the token that ends a turn."""
        ids = self._data_ids(text)
        return [*ids, *self._closing] if ended else ids

    def rendered(self, text: str, prompt: str = "") -> tuple[list[int], list[int]]:
        """Encode a conversation that somebody else has rendered with this chat template, up to and with its answer.

        The end of the last turn may be missing or may stand there, with white space after it. The token that begins
        every sequence may be missing: some clients take it off because their servers add it.

        Args:
            text: the rendered conversation.
            prompt: what of it is the prompt, with the words that open an answer; where it has none of them or is not
                the beginning of `text`, the answer is what stands after the last such words.

        Returns:
            The ids of the prompt and those of the response, closed as `response` closes one; control tokens in the
            response are inert.

        Raises:
            DataError: the template's words that open an answer do not stand in the text.
        """
        if not text.startswith(self._begins):
            text, prompt = self._begins + text, self._begins + prompt if prompt else ""
        if not text.startswith(prompt) or not any(words in prompt for words in self._openings):
            before, opening, _ = text.rpartition(self._header)
            if not opening:
                raise DataError(
                    f"a text without {self._header!r}, which opens an answer in the chat template of `{self.name}`. "
                    "Send the conversation as this template shows it, or as a list of turns."
                )
            prompt = before + opening
        answer, end = text[len(prompt) :].rstrip(), self.raw.convert_ids_to_tokens(self.end_of_turn)
        return self._template_ids(prompt), self.response(answer.removesuffix(end))

    @cached_property
    def _openings(self) -> list[str]:
        """What opens an answer: between a question and its answer, and where one is asked for, which may be shorter."""
        asked = self._render([{"role": "user", "content": "Q"}], True, True).rpartition(_CLOSE)[2]
        return [words for words in (self._header, asked) if words.strip()]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode a response to text without control tokens and outer white space."""
        return str(self.raw.decode(list(ids), skip_special_tokens=True)).strip()

    def option(self, text: str) -> int:
        """Return the single token that an option label such as ``A`` is written with at the start of an answer.

        Raises:
            ModelError: the label takes several tokens, so that its probability cannot be read in one step.
        """
        ids = self._data_ids(text)
        if len(ids) != 1:
            raise ModelError(f"model `{self.name}`: the option `{text}` takes {len(ids)} tokens; one is needed.")
        return ids[0]

    def option_ids(self, text: str) -> list[int]:
        """Return the tokens of an option at the start of an answer; a label of one character must be a single token.

        A number such as ``10`` may take one token for each digit.

        Raises:
            ModelError: a label of one character takes several tokens.
        """
        return [self.option(text)] if len(text) == 1 else self._data_ids(text)

    def show(self, messages: Messages) -> str:
        """Return the conversation as the model is shown it, control tokens visible."""
        return self._render(messages, True, False)

    def _render(self, messages: Messages, generation_prompt: bool, marked: bool) -> str:
        if marked:
            messages = [
                {"role": turn["role"], "content": f"{_OPEN}{index}{_CLOSE}"} for index, turn in enumerate(messages)
            ]
        try:
            text = self.raw.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
        except _FAILURES as problem:
            roles = ", ".join(str(turn["role"]) for turn in messages)
            raise ModelError(
                f"model `{self.name}`: its chat template fails on a conversation of the turns {roles}: "
                f"{str(problem)[:200].rstrip('.') or type(problem).__name__}. "
                "Give the model's folder a template that can show it."
            ) from None
        if len(text) > _MAX_AROUND + 4 * sum(len(turn["content"]) for turn in messages):
            raise ModelError(
                f"model `{self.name}`: its chat template makes {len(text)} characters of a short conversation. "
                "Give the model's folder a template that shows each turn once."
            )
        return str(text)

    def _encode(self, rendered: str, messages: Messages) -> list[int]:
        """Encode a rendered template that marks where data stands, and put the data's own ids there."""
        ids: list[int] = []
        for place, piece in enumerate(_MARK.split(rendered)):  # the template's own text and numbers of turns in turn
            ids += self._data_ids(messages[int(piece)]["content"]) if place % 2 else self._template_ids(piece)
        return ids

    def _template_ids(self, text: str) -> list[int]:
        return list(self.raw(text, add_special_tokens=False, split_special_tokens=False)["input_ids"])

    def _data_ids(self, text: str) -> list[int]:
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return list(self._inert(text, **options, verbose=False)["input_ids"])  # else it warns of a long text
