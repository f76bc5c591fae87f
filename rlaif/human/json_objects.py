"""The objects of a file of JSON lines or of one JSON list, each with the line it begins on; ``.gz`` of either.

NaN and infinity, which JSON has not but many programs write, are read as numbers: who reads the rows counts those that
cannot be used for them.
"""

import gzip
import json
import math
import zlib
from pathlib import Path
from typing import Any

from rlaif.documents import decode_text, read_text
from rlaif.errors import DataError
from rlaif.records import read_jsonl

Fields = dict[str, Any]


def read_objects(path: Path) -> list[tuple[int, Fields]]:
    """Return each object of a file with the line on which it begins.

    Raises:
        DataError: the file cannot be read, is not JSON throughout, or holds no objects.
    """
    text = _text_of_list(path)
    rows = list(read_jsonl(path, finite=False)) if text is None else _list_items(path, text)
    if not rows:
        raise DataError(f"{path}: no rows; at least one JSON object is expected.")
    return rows


def finite(value: Any) -> Any:
    """Return a value of JSON with each NaN and infinity in it as a text, so that it can be written."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list) else value


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
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(f"{path}:{line}: half of a `\\u` pair, which is no character. Mend the text.") from None
        rows.append((line, row))
        line += text.count("\n", start, end)
    return rows
