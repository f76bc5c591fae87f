"""Prompt templates: the one sandboxed Jinja environment, declared variables, hashes.

A template file starts with a comment that declares its variables, for example ``{# variables: prompt, response #}``.
What is declared must be exactly what is used, so a misspelt name is found when the file is loaded and not when the
ten-thousandth row is rendered. Templates are files, never data: a prompt or an answer is only ever a value.

A prompt template shows values, with conditions and a few filters, and nothing that repeats: so what it costs to render
is bounded by its own length and that of its values, whoever wrote it.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlaif.documents import read_text, shipped
from rlaif.errors import PromptError

MAX_TEMPLATE_CHARACTERS = 20_000
MAX_RENDERED_CHARACTERS = 400_000
# What an expression of a template can run into; the sandbox lets Python's own errors through.
_FAILURES = (
    *(jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError),
    *(AttributeError, RecursionError, MemoryError),
)
_FILTERS = ("capitalize", "default", "first", "last", "length", "lower", "string", "title", "trim", "truncate", "upper")
_ALLOWED = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.If, nodes.CondExpr),
    *(nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Test, nodes.Filter, nodes.Keyword),
    *(nodes.Getattr, nodes.Getitem, nodes.Slice),
)
_DECLARATION = re.compile(r"\A\{#-?\s*variables:\s*([\w, ]*?)\s*-?#\}\n?")


class _Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox without the operators and calls that make huge values of small ones."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse the operator."""
        raise SecurityError(f"the operator `{operator}` is not allowed in a template")

    def is_safe_callable(self, obj: Any) -> bool:
        """Allow a template's own macros and a look at a dict, and no other call."""
        looks = isinstance(getattr(obj, "__self__", None), dict) and obj.__name__ in ("items", "keys", "values")
        return isinstance(obj, Macro) or looks


def sandbox(*, autoescape: bool = False) -> ImmutableSandboxedEnvironment:
    """Return the environment that every template of this package is rendered in.

    It cannot reach Python internals or change what it is given, and a missing variable is an error. No other place in
    the package builds a Jinja environment.
    """
    environment = _Sandbox(
        undefined=jinja2.StrictUndefined, autoescape=autoescape, keep_trailing_newline=False, trim_blocks=True
    )
    environment.globals.clear()
    environment.filters = {name: FILTERS[name] for name in _FILTERS}
    return environment


@dataclass(frozen=True)
class Template:
    """One prompt template and the variables it declares."""

    path: Path
    source: str
    variables: tuple[str, ...]

    @property
    def name(self) -> str:
        """The verb that the file is named by, such as ``critique``."""
        return self.path.stem

    @property
    def hash(self) -> str:
        """SHA-256 (hexadecimal) of the source without its declaration."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return sandbox().from_string(self.source)

    def render(self, **values: str) -> str:
        """Fill the template in.

        Raises:
            PromptError: a declared variable is missing, an undeclared one is given, the sandbox refuses an operation,
                or the result is too long.
        """
        missing = sorted(set(self.variables) - set(values))
        unknown = sorted(set(values) - set(self.variables))
        if missing or unknown:
            raise PromptError(
                f"{self.path}: declares the variables {', '.join(self.variables)}; "
                f"missing: {', '.join(missing) or 'none'}; not declared: {', '.join(unknown) or 'none'}."
            )
        try:
            text = self._written(values)
        except _FAILURES as problem:
            said = str(problem).rstrip(".") or type(problem).__name__
            raise PromptError(f"{self.path}: cannot be rendered: {said}.") from None
        if len(text) > MAX_RENDERED_CHARACTERS:
            raise PromptError(
                f"{self.path}: rendered to more than {MAX_RENDERED_CHARACTERS} characters, the most allowed."
            )
        return text

    def _written(self, values: dict[str, str]) -> str:
        """Render piece by piece, and stop where it is too long."""
        parts, size = [], 0
        for part in self._compiled.generate(**values):
            parts.append(part)
            size += len(part)
            if size > MAX_RENDERED_CHARACTERS:
                break
        return "".join(parts)


def load_template(name: str, folder: Path | None = None) -> Template:
    """Load ``NAME.jinja`` from a folder, by default from the prompts that ship with the package.

    Raises:
        PromptError: no such file, a syntax error (with its line), no declaration, or variables used but not declared
            or declared but not used.
    """
    path = (folder or shipped("prompts")) / f"{name}.jinja"
    text = read_text(path, PromptError).replace("\r\n", "\n")
    if len(text) > MAX_TEMPLATE_CHARACTERS:
        raise PromptError(f"{path}: {len(text)} characters; a template may have {MAX_TEMPLATE_CHARACTERS}.")
    declaration = _DECLARATION.match(text)
    if declaration is None:
        raise PromptError(f"{path}:1: the first line must declare the variables, as in {{# variables: prompt #}}.")
    declared = tuple(word.strip() for word in declaration.group(1).split(",") if word.strip())
    source = text[declaration.end() :].rstrip("\n")
    template = Template(path, source, declared)
    try:
        tree = sandbox().parse(source)
        used = meta.find_undeclared_variables(tree)
        _refuse_what_repeats(tree, path, text.count("\n", 0, declaration.end()))
        _ = template._compiled  # finds what parsing does not, such as an unknown filter
    except jinja2.TemplateSyntaxError as problem:
        line = (problem.lineno or 1) + text.count("\n", 0, declaration.end())
        raise PromptError(f"{path}:{line}: not a Jinja template: {str(problem.message).rstrip('.')}.") from None
    except (SyntaxError, RecursionError, MemoryError):  # of Python, into which templates are compiled
        raise PromptError(f"{path}: its blocks or brackets stand inside each other too deep. Flatten it.") from None
    undeclared, unused = sorted(used - set(declared)), sorted(set(declared) - used)
    if undeclared or unused:
        raise PromptError(
            f"{path}:1: declares {', '.join(declared) or 'nothing'}; used but not declared: "
            f"{', '.join(undeclared) or 'none'}; declared but not used: {', '.join(unused) or 'none'}."
        )
    return template


def _refuse_what_repeats(tree: nodes.Node, path: Path, above: int) -> None:
    """Refuse loops, calls, assignments, imports and arithmetic: a prompt needs none, and each can run without end.

    Raises:
        PromptError: what was found, with its line.
    """
    for node in tree.find_all(nodes.Node):
        if not isinstance(node, _ALLOWED):
            found = type(node).__name__.lower()
            raise PromptError(
                f"{path}:{node.lineno + above}: `{found}` is not allowed in a prompt template; values, conditions and "
                f"these filters are: {', '.join(_FILTERS)}. Write it without."
            )
