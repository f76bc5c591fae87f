"""Statements in plain text and Markdown: numbered and bulleted lines, and headings with paragraphs."""

import re
from typing import NamedTuple

_HEADING = re.compile(r"(#{1,6})\s+(.+?)\s*#*\s*\Z")
_BULLET = re.compile(r"(\s*)(?:[-*+•]|\(?\d+[.)])\s+(.+)")
_LEAD = re.compile(r"(?:\*\*|__)(.+?)(?:\*\*|__)\s*[:.\u2014\u2013-]?\s*(.*)", re.DOTALL)
_UNDERLINE = re.compile(r"(=+|-+)\s*\Z")


class Statement(NamedTuple):
    """One statement: a title where it has one, its text, the headings above it, and its line."""

    title: str
    text: str
    headings: list[str]
    line: int


class _Reader:
    """Goes through lines and collects statements of a heading: its list items, else its paragraphs."""

    def __init__(self) -> None:
        self.name = ""
        self.found: list[Statement] = []
        self.left: list[str] = []
        self.path: list[tuple[int, str]] = []
        self.items: list[tuple[int, list[str]]] = []
        self.paragraphs: list[tuple[int, list[str]]] = []
        self.open: list[str] | None = None

    def heading(self, level: int, title: str, number: int) -> None:
        """Close the heading above and open this one."""
        self.close()
        if not self.name and not self.path and not self.found:
            self.name = plain(title)
        self.path = [one for one in self.path if one[0] < level] + [(level, plain(title))]

    def close(self) -> None:
        """Turn what stands below the present heading into statements."""
        headings = [title for _, title in self.path if title != self.name]
        if self.items:
            for line, words in self.paragraphs:
                self.left.append(f"the paragraph in line {line}, which is not part of the list: `{words[0][:50]}`")
            for line, words in self.items:
                self.found.append(_with_lead(" ".join(words), headings, line))
        elif self.paragraphs and headings:
            text = "\n\n".join(" ".join(words) for _, words in self.paragraphs)
            self.found.append(Statement(headings[-1], plain(text), headings[:-1], self.paragraphs[0][0]))
        else:
            for line, words in self.paragraphs:
                self.left.append(f"the paragraph in line {line}, which has no heading: `{words[0][:50]}`")
        self.items, self.paragraphs, self.open = [], [], None

    def line(self, text: str, number: int) -> None:
        """Take a line that is no heading."""
        bullet = _BULLET.fullmatch(text)
        if bullet and (len(bullet[1]) < 2 or not self.items):
            self.open = [bullet[2]]
            self.items.append((number, self.open))
        elif not text.strip():
            if self.open is not None and not (self.items and self.open is self.items[-1][1]):
                self.open = None
        elif bullet and self.items:  # a list inside a list belongs to the item above it
            self.open = self.items[-1][1]
            self.open.append(bullet[2])
        elif self.open is not None and (text[:1].isspace() or not self._after_blank):
            self.open.append(text.strip())
        else:
            self.open = [text.strip()]
            self.paragraphs.append((number, self.open))
        self._after_blank = not text.strip()

    _after_blank = False


def statements(text: str) -> tuple[str, list[Statement], list[str]]:
    """Return the name that the first heading gives, the statements, and what is none of them.

    Below a heading, the items of lists are the statements; where it has no list, its paragraphs are one statement, and
    the heading is its title. Text without any heading or list has none.
    """
    reader = _Reader()
    lines = text.splitlines()
    fenced = False
    for number, line in enumerate(lines, start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            if fenced:
                reader.left.append(f"the block of code in line {number}")
            continue
        following = lines[number] if number < len(lines) else ""
        heading = _HEADING.fullmatch(line.strip())
        if fenced or (number > 1 and _UNDERLINE.fullmatch(line) and lines[number - 2].strip()):
            continue
        if line.lstrip().startswith("|"):
            reader.left.append(f"the row of a table in line {number}")
        elif heading:
            reader.heading(len(heading[1]), heading[2], number)
        elif line.strip() and len(following) > 2 and _UNDERLINE.fullmatch(following):
            reader.heading(1 if following[0] == "=" else 2, line.strip(), number)
        else:
            reader.line(line, number)
    reader.close()
    return reader.name, reader.found, reader.left


def _with_lead(text: str, headings: list[str], line: int) -> Statement:
    """Take a bold beginning as the title."""
    lead = _LEAD.fullmatch(text)
    if lead and lead[2].strip():
        return Statement(plain(lead[1]).rstrip(":."), plain(lead[2]), headings, line)
    return Statement("", plain(text), headings, line)


def plain(text: str) -> str:
    """Take the marks of emphasis, code and links off a text."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1", r"\2", text)
    return re.sub(r"(?<![\w*])\*(?=\S)([^*]+?)(?<=\S)\*(?![\w*])", r"\1", text).strip()
