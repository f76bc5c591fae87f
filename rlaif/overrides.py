"""Values from the command line (``--set section.key=value``) over those of a recipe file."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rlaif.documents import Document, Key, Problem, Severity
from rlaif.errors import ConfigError

_SHORT = {"model": "model_name_or_path", "rounds": "count"}  # sections that a recipe may write as one value


@dataclass
class Overridden(Document):
    """A recipe with values from the command line, whose place in an error is the option itself."""

    options: dict[tuple[Key, ...], str] = field(default_factory=dict)

    def problem(self, keys: Sequence[Key], code: str, message: str, severity: Severity = "error") -> Problem:
        """Return a problem that stands at a key path, or at the option that set it."""
        set_by = [option for path, option in self.options.items() if tuple(keys[: len(path)]) == path]
        if set_by:
            return Problem(f"--set {set_by[-1]}", None, None, code, message, severity)
        return super().problem(keys, code, message, severity)


def override(document: Overridden, option: str) -> None:
    """Set one key of a document, creating sections on the way.

    Raises:
        ConfigError: an option that is no ``key=value``, or that goes through a plain value.
    """
    dotted, sign, text = option.partition("=")
    keys = dotted.strip().split(".")
    if not sign or not all(keys):
        raise ConfigError(f"--set {option}: `section.key=value` is expected.")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, OverflowError, RecursionError):  # such as the date 2024-13-01
        raise ConfigError(f"--set {option}: `{text}` is not a YAML value.") from None
    target = document.data
    for depth, key in enumerate(keys[:-1]):
        if not depth and key in _SHORT and isinstance(target.get(key), str | int):
            target[key] = {_SHORT[key]: target[key]}
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {option}: `{'.'.join(keys[: depth + 1])}` is a value, not a section.")
    target[keys[-1]] = value
    document.options[tuple(keys)] = option
