"""Files of people's labels, made up, and what is read from them."""

import json
from pathlib import Path
from typing import Any

from rlaif.human.importers import Imported, import_file

HH = {
    "chosen": "\n\nHuman: hello\n\nAssistant: good day",
    "rejected": "\n\nHuman: hello\n\nAssistant: go away",
}
TRL = {"prompt": "hello", "chosen": "good day", "rejected": "go away"}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def load(folder: Path, *rows: dict[str, Any], **options: Any) -> Imported:
    path = folder / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return import_file(path, **options)


def reasons(imported: Imported) -> list[str]:
    return [row["reason"] for row in imported.unused]
