"""Documents checked against pydantic models, with each problem in words about the file and not about the model."""

import difflib
import types
import typing
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rlaif.documents import Document, Key, Problem
from rlaif.errors import RlaifError

Model = TypeVar("Model", bound=BaseModel)


def validate(document: Document, model: type[Model], error: type[RlaifError]) -> Model:
    """Check a document against a pydantic model and report every problem at once.

    Raises:
        RlaifError: of the class ``error``, one line ``file:line:column: key: problem`` for each problem.
    """
    try:
        return model.model_validate(document.data)
    except ValidationError as problems:
        raise error(*describe(document, model, problems)) from None


def describe(document: Document, model: type[BaseModel], invalid: ValidationError) -> list[Problem]:
    """Return each of pydantic's problems as ``file:line:column: key: what was found and what was expected``."""
    codes, found = {"missing": "missing-key", "extra_forbidden": "unknown-key"}, []
    for item in invalid.errors(include_url=False):
        keys = real_keys(document.data, item)
        found.append(document.problem(keys, codes.get(item["type"], "wrong-value"), explain(model, keys, item)))
    return list(dict.fromkeys(found))


def explain(model: type[BaseModel], keys: Sequence[Key], item: Any) -> str:
    """Write one pydantic problem as ``key: what was found, what was expected and what to do``.

    Args:
        model: the model that was validated against.
        keys: the path of the key in the data (see `real_keys`).
        item: one of pydantic's ``ValidationError.errors()``.
    """
    dotted = ".".join(map(str, keys)) or "(file)"
    if item["type"] == "extra_forbidden":
        known = _field_names(model, keys[:-1])
        hint = guess(str(keys[-1]), known) or f"known keys: {', '.join(known)}."
        return f"{dotted}: unknown key; {hint if known else 'remove it.'}"
    if item["type"] == "missing":
        return f"{dotted}: this key is missing. Add it."
    message, found = item["msg"].removeprefix("Value error, "), item.get("input")
    shown = f"{found!r:.80}" if isinstance(found, str | int | float | bool | list) else ""
    if found is None:
        shown = "nothing"
    if item["type"] == "string_type" and isinstance(found, int | float):
        shown += "; put it in quotes"
    return f"{dotted}: {message}" + (f" (found {shown})" if shown else "")


def unknown_name(key: str, name: str, lacking: str, known: Collection[str]) -> str:
    """Return the problem of a name that a recipe gives and data lack, with the nearest one and all there are."""
    near, there = guess(name, known), ", ".join(f"`{one}`" for one in sorted(known)) or "none"
    found = f"{lacking} `{name}`" + (f"; {near}" if near else ".")
    return f"{key}: {found} There are: {there}. Correct the name, or leave it out."


def guess(name: str, known: Collection[str]) -> str:
    """Return the question whether the nearest of known names was meant; empty where none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean `{near[0]}`?" if near else ""


def real_keys(data: Any, item: Any) -> tuple[Key, ...]:
    """Return the path of a pydantic problem without the names of union members that pydantic puts into it."""
    location, keys = item["loc"], []
    for index, step in enumerate(location):
        if (isinstance(data, dict) and step in data) or (
            isinstance(data, list) and isinstance(step, int) and step < len(data)
        ):
            keys.append(step)
            data = data[step]
        elif index == len(location) - 1 and item["type"] == "missing":
            keys.append(step)
    return tuple(keys)


def _field_names(model: type[BaseModel], keys: Sequence[Key]) -> list[str]:
    """Return the keys that the (nested) model at a key path knows; none where there is no such model."""
    current, named = model, False  # whether the next key is a name that the user chose, as those of `engines`
    for key in keys:
        if named or isinstance(key, int):
            named = False
            continue
        fields = {field.alias or name: field for name, field in current.model_fields.items()}
        nested = _nested_model(fields[key].annotation) if key in fields else None
        named = key in fields and typing.get_origin(fields[key].annotation) is dict
        if nested is None:
            return []
        current = nested
    return [field.alias or name for name, field in current.model_fields.items()]


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return next(filter(None, map(_nested_model, typing.get_args(annotation))), None)
    return None
