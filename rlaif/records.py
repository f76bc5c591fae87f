"""The rows that travel between stages, and JSON lines in and out.

A file's rows are read with the number of the line they stand on, so every complaint can name ``file:line``.
The column names are those that `datasets`, TRL, axolotl and LLaMA-Factory read; `prompt`, `chosen`,
`rejected` and `messages` are lists of ``{"role", "content"}``.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from typing_extensions import TypedDict  # pydantic refuses typing.TypedDict before Python 3.12

from rlaif.documents import decode_text, read_text
from rlaif.errors import DataError
from rlaif.validation import explain, real_keys

Split = Literal["train", "eval"]


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


Messages = list[Message]
Turns = Annotated[Messages, Field(min_length=1)]
Identifier = Annotated[str, Field(min_length=1)]
Source = Literal["ai", "human", "construction"]
LARGEST = 1e12  # of a label's number: sums of weights and squares of ratings stay far from infinity
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Sign = Annotated[bool, Field(strict=True)]
# What Python's reader lets through and JSON cannot hold: half of a surrogate pair, a number beyond a double.
_SUSPECT = re.compile(r"\\u[dD]|\d[eE]\+?\d{3}")


class Row(BaseModel):
    """Base of all rows: unknown columns are refused, so a misspelt one cannot be lost silently."""

    model_config = ConfigDict(extra="forbid")


class Prompt(Row):
    """One prompt of a prompt set; `tag` says what kind (``harmful``, ``ordinary``, ``lookalike``, ...).

    A row brings `prompt`, a text, or `messages`, a conversation that ends with what the user says. Both stand in every
    prompt that was read: `messages` is what a model answers; `prompt` is the same as one text, for requests about the
    answer and for people. `prompt_sets.read_prompts` writes that text for a conversation.
    """

    id: Identifier
    prompt: str = ""
    messages: Messages = []
    tag: str = "ordinary"
    category: str = ""
    split: Split = "train"

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("an empty prompt; text is expected")
        return text

    @field_validator("messages")
    @classmethod
    def _user_first_and_last(cls, turns: Messages) -> Messages:
        spoken = turns[1:] if turns and turns[0]["role"] == "system" else turns
        roles = [turn["role"] for turn in spoken]
        if len(roles) % 2 == 0 or roles != [("user", "assistant")[place % 2] for place in range(len(roles))]:
            raise ValueError(
                f"the turns are {', '.join(turn['role'] for turn in turns) or 'none'}; at most one of system, then "
                "user and assistant by turns, the user first and last, are expected"
            )
        if not all(turn["content"].strip() for turn in turns):
            raise ValueError("an empty turn; text is expected in each")
        return turns

    @model_validator(mode="after")
    def _text_or_conversation(self) -> "Prompt":
        if not self.prompt and not self.messages:
            raise ValueError("neither `prompt` nor `messages`; one of them is expected")
        if not self.messages:
            self.messages = [{"role": "user", "content": self.prompt}]
        elif self.prompt and self.messages != [{"role": "user", "content": self.prompt}]:
            raise ValueError("`prompt` and `messages` say different things; one of them is expected")
        return self

    @property
    def is_conversation(self) -> bool:
        """Whether the prompt is more than one turn of the user."""
        return len(self.messages) > 1


class Demonstration(Row):
    """A prompt with the answer to imitate, and every text on the way to it."""

    id: Identifier
    prompt: Turns
    completion: Turns
    messages: Turns
    revisions: list[dict[str, Any]] = []
    tag: str = ""
    flags: list[str] = []
    provenance: dict[str, Any] = {}


class Comparison(Row):
    """Two answers to one prompt and how sure the labeller is that `chosen` is the better one.

    `preference` is P(chosen is better), 0.5 to 1; `margin` is optional and in units of the reward; `votes`
    holds each judgement that went into the preference. `weight` is how much the row counts among others.

    Safety is an order of its own beside the preference (Dai et al. 2023, arXiv 2310.12773): `safer` is P(chosen is
    the safer one), 0 to 1; `chosen_safe` and `rejected_safe` say of each answer alone whether it is safe. None: not
    known.
    """

    id: Identifier
    prompt: Turns
    chosen: Turns
    rejected: Turns
    preference: float = Field(ge=0.5, le=1.0)
    margin: Number | None = None
    source: Source
    annotator: str
    tag: str = ""
    split: Split = "train"
    weight: Weight = 1.0
    safer: float | None = Field(default=None, ge=0.0, le=1.0)
    chosen_safe: Sign | None = None
    rejected_safe: Sign | None = None
    votes: list[dict[str, Any]] = []
    flags: list[str] = []
    provenance: dict[str, Any] = {}


class Rating(Row):
    """One answer and the number an annotator gave it; the scale is the annotator's own, higher is better."""

    id: Identifier
    prompt: Turns
    response: Turns
    rating: Number
    source: Source
    annotator: str
    tag: str = ""
    split: Split = "train"
    weight: Weight = 1.0
    provenance: dict[str, Any] = {}


class Ranking(Row):
    """Two or more answers to one prompt in an order; `ranks` has a place for each: 1 is best, equal places are ties."""

    id: Identifier
    prompt: Turns
    responses: Annotated[list[Turns], Field(min_length=2)]
    ranks: list[Annotated[int, Field(ge=1, strict=True)]]
    source: Source
    annotator: str
    tag: str = ""
    split: Split = "train"
    weight: Weight = 1.0
    provenance: dict[str, Any] = {}

    @model_validator(mode="after")
    def _a_rank_for_each(self) -> "Ranking":
        if len(self.ranks) != len(self.responses):
            raise ValueError(
                f"{len(self.ranks)} `ranks` for {len(self.responses)} `responses`; one for each is expected"
            )
        if 1 not in self.ranks:
            raise ValueError(f"the best of `ranks` is {min(self.ranks)}; 1 is expected for the best response")
        return self


R = TypeVar("R", bound=Row)


def assistant(text: str) -> Messages:
    """Return one assistant turn, the form of `completion`, `chosen` and `rejected`."""
    return [{"role": "assistant", "content": text}]


def with_system(messages: Messages, text: str | None) -> Messages:
    """Return a conversation that begins with a system turn: its own, or else one of this text, if there is one."""
    if not text or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": text}, *messages]


def under_instructions(messages: Messages, text: str) -> Messages:
    """Return a conversation whose system turn begins with a text; what its own said comes after."""
    own = "".join(f"\n\n{turn['content']}" for turn in messages if turn["role"] == "system")
    return [{"role": "system", "content": text + own}, *(turn for turn in messages if turn["role"] != "system")]


def text_of(turns: Messages) -> str:
    """Return the text of the last turn."""
    return turns[-1]["content"]


def read_jsonl(path: Path, *, finite: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(line number, object)`` for each non-blank line of a JSON-lines file (or ``.gz`` of one).

    Raises:
        DataError: the file cannot be read, is not UTF-8, or a line (which is named) is not a JSON object,
            holds a key twice, text that is not Unicode, or, unless `finite` is False, NaN or infinity.
    """
    for number, line in _lines(path):
        yield number, _parse_line(line, f"{path}:{number}", finite)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(path.read_bytes())
        except FileNotFoundError:
            raise DataError(f"{path}: no such file.") from None
        except (OSError, EOFError, zlib.error) as problem:
            raise DataError(f"{path}: not a readable gzip file: {problem}. Compress it again.") from None
        text = decode_text(raw, path, DataError)
    else:
        text = read_text(path, DataError)
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _parse_line(line: str, where: str, finite: bool = True) -> dict[str, Any]:
    constant = _refuse_constant if finite else float
    try:
        row = json.loads(line, parse_constant=constant, object_pairs_hook=_without_duplicates)
        if _SUSPECT.search(line):
            json.dumps(row, ensure_ascii=False, allow_nan=not finite).encode()
    except json.JSONDecodeError as problem:
        raise DataError(
            f"{where}: not a JSON object: {problem.msg} at column {problem.colno}. "
            "Each line must hold one complete object."
        ) from None
    except UnicodeEncodeError:
        raise DataError(f"{where}: half of a `\\u` pair, which is no character. Mend the text.") from None
    except RecursionError:
        raise DataError(f"{where}: values stand inside values too deep to read. Flatten the row.") from None
    except ValueError as problem:
        raise DataError(f"{where}: {problem}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__}; one JSON object per line is expected.")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; a finite number or null is expected.")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key `{twice}` stands twice. Remove one.")
    return row


def read_rows(path: Path, kind: type[R]) -> list[R]:
    """Read a whole file as rows of one kind; errors are those of `read_numbered`."""
    return [row for _, _, row in read_numbered(path, kind)]


def read_numbered(path: Path, kind: type[R]) -> list[tuple[int, dict[str, Any], R]]:
    """Read a whole file as rows of one kind, each after its line's number and object; report every bad line at once.

    Raises:
        DataError: a line that is not a row of this kind, an id used twice, or a file without rows.
    """
    rows: list[tuple[int, dict[str, Any], R]] = []
    problems: list[str] = []
    first_line: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            data = _parse_line(line, f"{path}:{number}")
            row = kind.model_validate(data)
        except DataError as problem:
            problems.append(str(problem))
            continue
        except ValidationError as invalid:
            for item in invalid.errors(include_url=False):
                problems.append(f"{path}:{number}: {explain(kind, real_keys(data, item), item)}")
            continue
        identifier = str(getattr(row, "id"))  # noqa: B009
        if identifier in first_line:
            first = first_line[identifier]
            problems.append(f"{path}:{number}: the id `{identifier}` stands already in line {first}")
        first_line.setdefault(identifier, number)
        rows.append((number, data, row))
    if problems:
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise DataError("\n".join(shown))
    if not rows:
        raise DataError(f"{path}: no rows; at least one JSON object is expected.")
    return rows


def jsonl(rows: Iterable[Row | dict[str, Any]]) -> str:
    """Serialize rows, one JSON object per line.

    Raises:
        ValueError: a row holds NaN or infinity, which JSON cannot express.
    """
    plain = (row.model_dump() if isinstance(row, Row) else row for row in rows)
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in plain)
