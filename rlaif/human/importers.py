"""Import people's labels: other projects' preference files become the comparisons that AI labels become too.

Two formats are known, and told apart by their columns:

- ``hh-rlhf``: `chosen` and `rejected` are transcripts, whose turns begin with ``Human:`` or ``Assistant:``
  after a blank line;
- ``trl``: `chosen` and `rejected` are texts or conversations, after a `prompt` or what both begin with.

Either may have the columns `preference`, `margin`, `tag`, `annotator` and `id`. A row that cannot be used is
kept aside with its line and a reason; none is dropped.
"""

import gzip
import json
import os
import re
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from rlaif.documents import decode_text, file_sha256, fingerprint, read_text
from rlaif.errors import ConfigError, DataError
from rlaif.records import Comparison, Message, Messages, assistant, read_jsonl
from rlaif.transcripts import (
    OPEN_TRANSCRIPT,
    TURN,
    Unusable,
    conversation,
    refuse_odd_turns,
    split_of,
    transcript,
)

FORMATS: dict[str, frozenset[str]] = {
    "hh-rlhf": frozenset({"chosen", "rejected"}),
    "trl": frozenset({"prompt", "chosen", "rejected"}),
}
"""The columns of each format besides the optional ones."""

Fields = dict[str, Any]
OPTIONAL = frozenset({"preference", "margin", "tag", "annotator", "id"})
REASONS: tuple[str, ...] = (
    "not a text or a conversation",
    "text before the first turn",
    "empty chosen",
    "empty rejected",
    "no assistant turn",
    "last turn is not the assistant's",
    "contexts differ",
    "odd roles",
    "empty turn",
    "identical answers",
    "preference outside [0, 1]",
    "margin not finite",
    "a name that is not text",
)
"""Why a row is not used; besides these, "duplicate of line N" and "id used in line N"."""


class Imported(NamedTuple):
    """What `import_file` made of a file.

    `unused` holds ``{"line", "reason", "row"}`` of each row that became none; `format` is one of `FORMATS`.
    """

    comparisons: list[Comparison]
    unused: list[Fields]
    format: str


def import_file(
    path: Path,
    *,
    tag: str = "",
    annotator: str = "human",
    format: str | None = None,
    eval_fraction: float = 0.1,
    seed: int = 0,
) -> Imported:
    """Read people's preferences as comparisons.

    The file holds JSON lines or one JSON list of objects, or is a ``.gz`` of either. `preference` is the
    probability that `chosen` is better, 1 where it is absent; below 0.5 the two sides change places (and
    `margin` its sign), and exactly 0.5 is kept as a tie. Rows that share their first user turn fall on the
    same side of the split.

    Args:
        path: the file.
        tag: the tag of rows that name none.
        annotator: the annotator of rows that name none.
        format: one of `FORMATS`; found from the columns where None.
        eval_fraction: the share of opening questions, 0 to 1, whose rows are for evaluation.
        seed: chooses which opening questions those are.

    Returns:
        The comparisons in the order of the file, the rows not used, and the format.

    Raises:
        DataError: the file cannot be read, is not JSON throughout, holds no rows, or has columns
            that no format has.
        ConfigError: `format` or `eval_fraction` is not one of those named above.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"format: `{format}` is not known. Expected one of: {', '.join(FORMATS)}.")
    if not 0 <= eval_fraction <= 1:
        raise ConfigError(f"eval_fraction: {eval_fraction}; a share between 0 and 1 is expected.")
    rows = _objects(path)
    found = _format_of(path, rows, format)
    source = {"file": path.name, "sha256": file_sha256(path)}
    comparisons: list[Comparison] = []
    unused: list[Fields] = []
    seen: dict[str, int] = {}
    for line, row in rows:
        provenance = {**source, "line": line, "format": found}
        try:
            comparison = _comparison(row, found, {"tag": tag, "annotator": annotator}, provenance)
            _refuse_second(comparison, line, seen)
        except Unusable as reason:
            unused.append({"line": line, "reason": str(reason), "row": row})
            continue
        comparison.split = split_of(comparison.prompt, eval_fraction, seed)
        comparisons.append(comparison)
    assert len(comparisons) + len(unused) == len(rows), "a row was lost"
    return Imported(comparisons, unused, found)


def _objects(path: Path) -> list[tuple[int, Fields]]:
    """Return each object of the file with the line on which it begins."""
    text = _text_of_list(path)
    rows = list(read_jsonl(path)) if text is None else _list_items(path, text)
    if not rows:
        raise DataError(f"{path}: no rows; at least one JSON object is expected.")
    return rows


def _text_of_list(path: Path) -> str | None:
    """Return the text of a file that holds one JSON list, or None for any other."""
    if path.suffix == ".gz":
        try:
            text = decode_text(gzip.decompress(path.read_bytes()), path, DataError)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file. Check the path.") from None
        except (OSError, EOFError, zlib.error) as problem:
            raise DataError(f"{path}: not a readable gzip file: {problem}. Compress it again.") from None
    else:
        text = read_text(path, DataError)
    return text if text.lstrip().startswith("[") else None


def _list_items(path: Path, text: str) -> list[tuple[int, Fields]]:
    """Return the objects of a JSON list, held to what `read_jsonl` asks of a line."""
    try:
        if not all(isinstance(item, dict) for item in json.loads(text)):
            raise DataError(f"{path}: a JSON list of other things than objects; objects are expected.")
    except (ValueError, RecursionError) as problem:
        line = getattr(problem, "lineno", 1)
        raise DataError(
            f"{path}:{line}: not a JSON list: {problem}. Give one list of objects, or an object on each line."
        ) from None
    decoder, rows, end, line = json.JSONDecoder(), [], 0, 1
    while (start := text.find("{", end)) >= 0:
        line += text.count("\n", end, start)
        row, end = decoder.raw_decode(text, start)
        try:
            json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as problem:
            raise DataError(f"{path}:{line}: {problem}. Finite numbers and Unicode are expected.") from None
        rows.append((line, row))
        line += text.count("\n", start, end)
    return rows


def _format_of(path: Path, rows: list[tuple[int, Fields]], wanted: str | None) -> str:
    """Tell the format from the columns, and where both would do, from the markers of a transcript."""
    columns = {column for _, row in rows for column in row}
    marked = sum(bool(TURN.match(str(row.get("chosen")))) for _, row in rows)
    name = wanted or ("hh-rlhf" if 2 * marked >= len(rows) and "prompt" not in columns else "trl")
    missing, unknown = {"chosen", "rejected"} - columns, columns - FORMATS[name] - OPTIONAL
    if missing or unknown:
        what = [f"lacks {', '.join(sorted(missing))}"] * bool(missing)
        what += [f"has the unknown {', '.join(sorted(unknown))}"] * bool(unknown)
        known = "; ".join(f"{key}: {', '.join(sorted(value))}" for key, value in FORMATS.items())
        seen, optional = ", ".join(sorted(columns)) or "none", ", ".join(sorted(OPTIONAL))
        raise DataError(
            f"{path}: of columns, the file {' and '.join(what)}. Seen: {seen}. Known formats: {known}; each "
            f"may also have {optional}. Rename or remove columns to match one."
        )
    return name


def _comparison(row: Fields, format: str, defaults: dict[str, str], provenance: Fields) -> Comparison:
    """Build the comparison of one row, or raise the reason why there is none."""
    chosen, rejected, flags = _conversations(row, format)
    prompt = _checked(chosen, rejected)
    preference, margin = _preference(row.get("preference")), _margin(row.get("margin"))
    if preference < 0.5:
        chosen, rejected, preference = rejected, chosen, 1 - preference
        margin = None if margin is None else 0.0 - margin
        flags = [*flags, "sides swapped"]
    content: Fields = {
        "prompt": prompt,
        "chosen": chosen[-1:],
        "rejected": rejected[-1:],
        "preference": preference,
        "margin": margin,
        **{key: _word(row.get(key), default) for key, default in defaults.items()},
    }
    identifier = _word(row.get("id"), fingerprint(content)[:16])
    return Comparison(id=identifier, source="human", flags=flags, provenance=provenance, **content)


def _refuse_second(comparison: Comparison, line: int, seen: dict[str, int]) -> None:
    """Note a comparison's content and id, and refuse what stood in the file before."""
    content = fingerprint(comparison.model_dump(exclude={"provenance", "flags", "split"}))
    if content in seen:
        raise Unusable(f"duplicate of line {seen[content]}")
    if comparison.id in seen:
        raise Unusable(f"id used in line {seen[comparison.id]}")
    seen[content] = seen[comparison.id] = line


def _conversations(row: Fields, format: str) -> tuple[Messages, Messages, list[str]]:
    """Return both sides as whole conversations, and flags that say how they were found."""
    sides = row.get("chosen"), row.get("rejected")
    for side, value in zip(("chosen", "rejected"), sides, strict=True):
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            raise Unusable(f"empty {side}")
    chosen, rejected = sides
    if format == "hh-rlhf":
        return transcript(chosen), transcript(rejected), []
    prompt = row.get("prompt")
    if prompt is not None:
        return _after(prompt, chosen), _after(prompt, rejected), []
    if isinstance(chosen, str) and isinstance(rejected, str):
        return (*_shared_prefix(chosen, rejected), ["prompt from the shared beginning"])
    return conversation(chosen), conversation(rejected), []


def _after(prompt: Any, answer: Any) -> Messages:
    """Join a prompt (text, transcript or conversation) and an answer, which may repeat the prompt."""
    if isinstance(prompt, str) and isinstance(answer, str) and OPEN_TRANSCRIPT.match(prompt):
        return transcript(f"{prompt.rstrip()} {answer}")
    before = [_user(prompt)] if isinstance(prompt, str) else conversation(prompt)
    after = assistant(answer.strip()) if isinstance(answer, str) else conversation(answer)
    repeated = len(after) > len(before) and _same(after[: len(before)], before)
    return after if repeated else before + after


def _shared_prefix(chosen: str, rejected: str) -> tuple[Messages, Messages]:
    """Split two texts where they part, at the last space before: what they share is the prompt."""
    chosen, rejected = chosen.strip(), rejected.strip()
    if chosen == rejected:
        raise Unusable("identical answers")
    shared = os.path.commonprefix([chosen, rejected])
    words = re.match(r"(.*\S)\s", shared, re.DOTALL)
    if words is None:
        raise Unusable("contexts differ")
    cut = words.end(1)
    before = _user(chosen[:cut])
    return [before, *assistant(chosen[cut:].strip())], [before, *assistant(rejected[cut:].strip())]


def _user(text: str) -> Message:
    return {"role": "user", "content": text.strip()}


def _same(some: Messages, others: Messages) -> bool:
    """Compare turns by role and text, whatever white space surrounds the text."""
    plain = ([(turn["role"], turn["content"].strip()) for turn in turns] for turns in (some, others))
    return next(plain) == next(plain)


def _checked(chosen: Messages, rejected: Messages) -> Messages:
    """Return the turns before the answers, having checked that the two can be compared."""
    for turns in (chosen, rejected):
        if all(turn["role"] != "assistant" for turn in turns):
            raise Unusable("no assistant turn")
        if turns[-1]["role"] != "assistant":
            raise Unusable("last turn is not the assistant's")
    if not _same(chosen[:-1], rejected[:-1]):
        raise Unusable("contexts differ")
    prompt = chosen[:-1]
    refuse_odd_turns(prompt)
    for side, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns[-1]["content"].strip():
            raise Unusable(f"empty {side}")
    if _same(chosen, rejected):
        raise Unusable("identical answers")
    return prompt


def _preference(value: Any) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise Unusable("preference outside [0, 1]")
    return float(value)


def _margin(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise Unusable("margin not finite")
    return float(value)


def _word(value: Any, default: str) -> str:
    """Return a name that a row gives as text or a number, or the default where it gives none."""
    if value is not None and not isinstance(value, str | int):
        raise Unusable("a name that is not text")
    return ("" if value is None else str(value).strip()) or default
