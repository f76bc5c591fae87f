"""Import people's labels: other projects' files become the rows that AI labels become too.

A format is told by its columns (`FORMATS`). Each may also have the columns `weight`, `tag`, `annotator` and `id`.
Rows of one pair by different annotators stay rows of their own. A row that cannot be used is kept aside with its line
and a reason; none is dropped.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from rlaif.documents import file_sha256, fingerprint
from rlaif.errors import ConfigError, DataError
from rlaif.human import pairs, ratings
from rlaif.human.contradictions import mark
from rlaif.human.json_objects import Fields, finite, read_objects
from rlaif.human.pairs import VOTERS, Pair
from rlaif.human.ratings import Ranked, Rated
from rlaif.human.values import weight, word
from rlaif.records import Comparison, Ranking, Rating
from rlaif.transcripts import TURN, Unusable, split_of

Labelled = Comparison | Rating | Ranking
Kind = Literal["comparisons", "ratings", "rankings"]


class Format(NamedTuple):
    """A form of rows: how one is read, its columns, those it may have, and those kept as they are for a trace."""

    read: Callable[[Fields], Pair | Rated | Ranked]
    columns: frozenset[str]
    optional: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()
    kind: Kind = "comparisons"


ANY = frozenset({"weight", "tag", "annotator", "id"})
_PAIR = frozenset({"preference", "margin", "safer", "chosen_safe", "rejected_safe"})
_SAFETY = frozenset({"safer_response_id", "is_response_0_safe", "is_response_1_safe"})
_OF_A_RESPONSE = ("source", "harm_category", "severity_level", "sha256")
_PKU_KEPT = frozenset({"prompt_source", *(f"response_{side}_{name}" for side in (0, 1) for name in _OF_A_RESPONSE)})
FORMATS: dict[str, Format] = {
    "hh-rlhf": Format(pairs.hh_rlhf, frozenset({"chosen", "rejected"}), _PAIR),
    "trl": Format(pairs.trl, frozenset({"chosen", "rejected"}), _PAIR | {"prompt"}),
    "pku-saferlhf": Format(
        pairs.pku_saferlhf,
        frozenset({"prompt", "response_0", "response_1", "better_response_id"}),
        _SAFETY,
        _PKU_KEPT,
    ),
    "pandalm": Format(
        pairs.pandalm,
        frozenset({"instruction", "response1", "response2", *VOTERS}),
        frozenset({"input"}),
        frozenset({"idx", "motivation_app", "cmp_key"}),
    ),
    "llmbar": Format(pairs.llmbar, frozenset({"input", "output_1", "output_2", "label"})),
    "unpaired": Format(ratings.unpaired, frozenset({"prompt", "completion", "label"}), kind="ratings"),
    "ratings": Format(ratings.rated, frozenset({"prompt", "response", "rating"}), kind="ratings"),
    "rankings": Format(ratings.ranked, frozenset({"prompt", "responses"}), frozenset({"ranks"}), kind="rankings"),
}
"""The known formats; `ANY` may stand in all of them."""


class Imported(NamedTuple):
    """What `import_file` made of a file.

    `unused` holds ``{"line", "reason", "row"}`` of each row that became none; `format` is one of `FORMATS`.
    `contradictory` names each row that says the opposite of another by the same annotator, and that other one; both
    are kept.
    """

    comparisons: list[Comparison]
    unused: list[Fields]
    format: str
    ratings: list[Rating] = []
    rankings: list[Ranking] = []
    contradictory: dict[str, str] = {}

    @property
    def rows(self) -> list[Labelled]:
        """All rows that can be used."""
        return [*self.comparisons, *self.ratings, *self.rankings]

    @property
    def kind(self) -> Kind:
        """What the rows of the file are; a file holds one kind."""
        if self.format in FORMATS:
            return FORMATS[self.format].kind
        return "ratings" if self.ratings else "rankings" if self.rankings else "comparisons"


def import_file(
    path: Path,
    *,
    tag: str = "",
    annotator: str = "human",
    format: str | None = None,
    eval_fraction: float = 0.1,
    seed: int = 0,
) -> Imported:
    """Read people's preferences as comparisons, and their ratings and rankings as such.

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
        The rows in the order of the file, the rows not used, and the format.

    Raises:
        DataError: the file cannot be read, is not JSON throughout, holds no rows, or has columns
            that no format has.
        ConfigError: `format` or `eval_fraction` is not one of those named above.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"format: `{format}` is not known. Expected one of: {', '.join(FORMATS)}.")
    if not 0 <= eval_fraction <= 1:
        raise ConfigError(f"eval_fraction: {eval_fraction}; a share between 0 and 1 is expected.")
    objects = read_objects(path)
    found = _format_of(path, objects, format)
    source = {"file": path.name, "sha256": file_sha256(path)}
    rows: list[Labelled] = []
    unused: list[Fields] = []
    seen: dict[str, tuple[str, str]] = {}
    for line, fields in objects:
        provenance = {**source, "line": line, "format": found}
        try:
            row = _row(fields, FORMATS[found], {"tag": tag, "annotator": annotator}, provenance)
            _refuse_second(row, line, seen)
        except Unusable as reason:
            unused.append({"line": line, "reason": str(reason), "row": finite(fields)})
            continue
        row.split = split_of(row.prompt, eval_fraction, seed)
        rows.append(row)
    assert len(rows) + len(unused) == len(objects), "a row was lost"
    return sorted_out(rows, unused, found)


def sorted_out(rows: list[Labelled], unused: list[Fields], format: str) -> Imported:
    """Return rows by their kind, those that contradict each other marked."""
    return Imported(
        [row for row in rows if isinstance(row, Comparison)],
        unused,
        format,
        [row for row in rows if isinstance(row, Rating)],
        [row for row in rows if isinstance(row, Ranking)],
        mark(rows),
    )


def _format_of(path: Path, rows: list[tuple[int, Fields]], wanted: str | None) -> str:
    """Tell the format from the columns, and where two would do, from the markers of a transcript."""
    columns = {column for _, row in rows for column in row}
    name = wanted or max(FORMATS, key=lambda known: _likeness(columns, FORMATS[known]))
    if not wanted and name in ("hh-rlhf", "trl"):
        marked = sum(bool(TURN.match(str(row.get("chosen")))) for _, row in rows)
        name = "hh-rlhf" if 2 * marked >= len(rows) and "prompt" not in columns else "trl"
    form = FORMATS[name]
    missing, unknown = form.columns - columns, columns - form.columns - form.optional - form.kept - ANY
    if missing or unknown:
        what = [f"lacks {', '.join(sorted(missing))}"] * bool(missing)
        what += [f"has the unknown {', '.join(sorted(unknown))}"] * bool(unknown)
        known = "".join(f"\n  {key}: {_told(value)}" for key, value in FORMATS.items())
        raise DataError(
            f"{path}: of the columns of `{name}`, the nearest format, the file {' and '.join(what)}. Seen: "
            f"{', '.join(sorted(columns)) or 'none'}. Rename or remove columns to match a known format; each may "
            f"also have {', '.join(sorted(ANY))}.{known}"
        )
    return name


def _likeness(columns: set[str], form: Format) -> tuple[int, int]:
    """Tell how well columns fit a format: how few are missing or unknown, then how many of its own there are."""
    unknown = columns - form.columns - form.optional - form.kept - ANY
    return -len(form.columns - columns) - len(unknown), len(form.columns & columns)


def _told(form: Format) -> str:
    more = f"; and perhaps {', '.join(sorted(form.optional))}" if form.optional else ""
    return ", ".join(sorted(form.columns)) + more


def _row(fields: Fields, form: Format, defaults: dict[str, str], provenance: Fields) -> Labelled:
    """Build the row of one object, or raise the reason why there is none."""
    said = form.read(fields)
    names: Fields = {key: word(fields, key, default) for key, default in defaults.items()}
    identifier, counts = word(fields, "id", ""), weight(fields)
    kept = {key: finite(fields[key]) for key in sorted(form.kept & fields.keys())}
    provenance |= {"columns": kept} if kept else {}
    if isinstance(said, Pair):
        return _comparison(said, names, identifier, counts, provenance)
    content = said._asdict() | names
    own: Fields = {"id": identifier or fingerprint([content, counts])[:16], "source": "human", "provenance": provenance}
    kind = Rating if isinstance(said, Rated) else Ranking
    return kind.model_validate(content | own | {"weight": counts})


def _comparison(pair: Pair, names: Fields, identifier: str, counts: float, provenance: Fields) -> Comparison:
    """Build the comparison of a pair; the better answer becomes the chosen one."""
    flags = list(pair.flags)
    if pair.first:
        provenance = {**provenance, "chosen": pair.first}
    if pair.preference < 0.5:
        pair = pairs.turned(pair)
        flags += [] if pair.first else [pairs.SWAPPED]
    flags += [pairs.AGAINST_SIGNS] if pairs.against_signs(pair) else []
    content = {key: getattr(pair, key) for key in ("prompt", "chosen", "rejected", "preference", "margin")} | names
    # Only what a row says of these goes into its id, so that they change no id of a row that says nothing.
    more = {key: getattr(pair, key) for key in ("safer", "chosen_safe", "rejected_safe")} | {"votes": list(pair.votes)}
    said = {key: value for key, value in more.items() if value is not None and value != []}
    said |= {"weight": counts} if counts != 1 else {}
    own: Fields = {"id": identifier or fingerprint(content | said)[:16], "source": "human", "flags": flags}
    return Comparison.model_validate(content | said | own | {"provenance": provenance})


class Earlier(NamedTuple):
    """Where a row's id stood before; `alike`: with the same content by the same annotator."""

    place: str
    alike: bool


def why_unused(row: Labelled, file: str, seen: dict[str, tuple[str, str]]) -> str:
    """Note a row of one of several files, or return the reason why it is none of its own; `seen` begins empty."""
    before = _earlier(row, file, seen)
    if before is None:
        return ""
    if not before.alike:
        return f"id used in {before.place} by another row"
    return "stands there twice" if before.place == file else "stands in two files"


def _refuse_second(row: Labelled, line: int, seen: dict[str, tuple[str, str]]) -> None:
    """Note a row of a file, and refuse what stood there before."""
    before = _earlier(row, f"line {line}", seen)
    if before:
        raise Unusable(f"{'duplicate of' if before.alike else 'id used in'} {before.place}")


def _earlier(row: Labelled, place: str, seen: dict[str, tuple[str, str]]) -> Earlier | None:
    """Note a row's content and id with its place, or return where they stood before.

    An id may name what several annotators judged; the later ones get their names added to it.
    """
    about = row.model_dump(exclude={"provenance", "flags", "split"})
    content = fingerprint(about | {"id": row.id.removesuffix(f"@{row.annotator}")})
    if content in seen:
        return Earlier(seen[content][0], alike=True)
    if row.id in seen and seen[row.id][1] != row.annotator:
        row.id = f"{row.id}@{row.annotator}"
    if row.id in seen:
        return Earlier(seen[row.id][0], alike=False)
    seen[content] = seen[row.id] = place, row.annotator
    return None
