"""What a trained reward or cost model is worth: accuracy beside rules that need no model, calibration, and biases.

Everything is measured on held-out rows, and written to ``calibration.json``. Nothing here changes the model.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlaif import bag_of_words
from rlaif.counterfactuals import SWAPS
from rlaif.maths import agreement, calibration
from rlaif.model.groups import Group
from rlaif.progress import Progress
from rlaif.records import Comparison, Demonstration, Messages, text_of
from rlaif.stages.quality import RULES
from rlaif.stages.reward_data import Labelled, answers_of
from rlaif.stages.reward_model import RewardModel, Scale, encode_group
from rlaif.stages.reward_pairs import pairs_among
from rlaif.stages.training import diverged

_SMALLEST_SCALE = 1e-6
_SLICES = 4
_REFERENCES = 64
_SWAPPED = 64


class Scored(NamedTuple):
    """Rows with the score that each member gives to each of their answers, ``[answers, M]`` a row."""

    rows: list[Labelled]
    members: list[Tensor]


def score_rows(model: RewardModel, rows: Sequence[Labelled], size: int, progress: Progress, title: str) -> Scored:
    """Score all answers of rows, in batches of rows of similar length.

    Raises:
        StageError: a score is not a finite number.
    """
    groups = [encode_group(model, row.prompt, answers_of(row)) for row in rows]
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -sum(map(len, (groups[i].prompt, *groups[i].responses))))
    with progress.task(title, len(rows)) as task:
        for start in range(0, len(order), size):
            part = order[start : start + size]
            scores = model.members([groups[index] for index in part]).cpu()
            if not scores.isfinite().all():
                raise diverged("reward", "reward", f"{title} are not finite numbers")
            for index, own in zip(
                part, torch.split(scores, [len(groups[index].responses) for index in part]), strict=True
            ):
                found[index] = own
            task.advance(len(part))
    return Scored(list(rows), found)


def scales_of(members: Tensor) -> list[Scale]:
    """Return each member's mean and deviation over responses ``[n, M]``."""
    return [
        Scale(column.mean().item(), max(column.std(correction=0).item(), _SMALLEST_SCALE))
        for column in members.unbind(1)
    ]


def references(demonstrations: Sequence[Demonstration]) -> tuple[str, list[tuple[Messages, Messages]]]:
    """Return what scores are centred on: demonstrations, as Ouyang et al. 2022 do, else the held-out answers' own."""
    if demonstrations:
        step = max(1, len(demonstrations) // _REFERENCES)
        chosen = demonstrations[::step][:_REFERENCES]
        return "demonstrations", [(row.prompt, row.completion) for row in chosen]
    return "held-out answers", []


# --- comparisons -----------------------------------------------------------------------------------------------------


def pairs_of(scored: Scored, score: Callable[[Tensor], Tensor]) -> tuple[list[Comparison], Tensor]:
    """Return the pairs that the labels of scored rows allow, and the gap, better minus worse, of each."""
    found = pairs_among(scored.rows)
    scores = [score(own) for own in scored.members]
    gaps = [scores[pair.better[0]][pair.better[1]] - scores[pair.worse[0]][pair.worse[1]] for pair in found]
    return [pair.comparison for pair in found], torch.stack(gaps) if gaps else torch.empty(0)


def describe_pairs(rows: Sequence[Comparison], gaps: Tensor, train: Sequence[Comparison]) -> dict[str, Any]:
    """Return accuracy, likelihood and calibration on comparisons that were not trained on.

    Accuracy counts the comparisons that prefer one side; a gap of 0 is half right. Baselines are on the same rows.
    """
    decided = [index for index, row in enumerate(rows) if row.preference > 0.5]
    own = [rows[index] for index in decided]
    right = [_rightness(gaps[index].item()) for index in decided]
    preference = [row.preference for row in rows]
    lengths = [len(text_of(row.chosen)) - len(text_of(row.rejected)) for row in own]
    return {
        "heldout": {"all": _rate(right), **_by(own, right, lambda row: [row.tag] if row.tag else [])},
        "by_source": _by(own, right, lambda row: [row.source]),
        "by_annotator": _by(own, right, lambda row: [row.annotator]),
        "by_principle": _by(own, right, principles_of),
        "by_preference": _slices([row.preference for row in own], right),
        "by_margin": _slices([row.margin for row in own if row.margin is not None], _with_margin(own, right)),
        "by_length_difference": _slices([float(length) for length in lengths], right),
        "baselines": baselines(own, train),
        "nll": calibration.nll(gaps.numpy(), preference),
        "ece": calibration.ece(gaps.numpy(), preference),
        "reliability": [_bin(one) for one in calibration.reliability(gaps.numpy(), preference)],
        "temperature": calibration.fit_temperature(gaps.numpy(), preference)._asdict(),
        "heldout_pairs": len(rows),
    }


def baselines(rows: Sequence[Comparison], train: Sequence[Comparison]) -> dict[str, Any]:
    """Return the accuracy of rules that look at length, at refusal words, or at words; a tie counts as half right."""
    words = bag_of_words.fit(
        [text_of(row.chosen) for row in train],
        [text_of(row.rejected) for row in train],
        [row.preference for row in train],
    )

    def accuracy(feature: Callable[[str], float]) -> dict[str, Any]:
        gaps = [feature(text_of(row.chosen)) - feature(text_of(row.rejected)) for row in rows]
        return agreement.win_rate(sum(gap > 0 for gap in gaps), sum(gap == 0 for gap in gaps), len(gaps))._asdict()

    rules = RULES | {"bag_of_words": lambda text: float(words.scores([text])[0])}
    return {name: accuracy(feature) for name, feature in rules.items()}


def principles_of(row: Comparison) -> list[str]:
    """Return the principles that a comparison was judged under."""
    return sorted({str(vote["principle"]) for vote in row.votes if vote.get("principle")})


def _rightness(gap: float) -> float:
    return 1.0 if gap > 0 else 0.0 if gap < 0 else 0.5


def _with_margin(rows: Sequence[Comparison], right: Sequence[float]) -> list[float]:
    return [value for row, value in zip(rows, right, strict=True) if row.margin is not None]


def _by(
    rows: Sequence[Comparison], right: Sequence[float], names: Callable[[Comparison], list[str]]
) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[float]] = {}
    for row, value in zip(rows, right, strict=True):
        for name in names(row):
            groups.setdefault(name, []).append(value)
    return {name: _rate(values) for name, values in sorted(groups.items())}


def _rate(right: Sequence[float]) -> dict[str, Any]:
    return agreement.wilson(sum(right), len(right))._asdict()


def _slices(values: Sequence[float], right: Sequence[float]) -> list[dict[str, Any]]:
    if len(set(values)) < 2:
        return []
    found = calibration.accuracy_by_quantile(values, right, _SLICES)
    return [{"low": one.low, "high": one.high, "accuracy": one.accuracy._asdict()} for one in found]


def _bin(one: calibration.Bin) -> dict[str, Any]:
    return {**one._asdict(), "accuracy": one.accuracy._asdict() if one.accuracy else None}


# --- biases ----------------------------------------------------------------------------------------------------------


def length_correlation(scored: Scored, score: Callable[[Tensor], Tensor]) -> dict[str, float | None]:
    """Return how scores go with the lengths of answers in characters."""
    lengths = [float(len(text_of(answer))) for row in scored.rows for answer in answers_of(row)]
    scores = [value for own in scored.members for value in score(own).tolist()]
    return {"pearson": calibration.pearson(lengths, scores), "spearman": calibration.spearman(lengths, scores)}


def counterfactual_gaps(model: RewardModel, rows: Sequence[Labelled], scale: float, size: int) -> dict[str, Any]:
    """Return how far scores move when pronouns or names are exchanged in prompt and answer, in deviations of a score.

    `mean` is exchanged minus original, with its interval; `mean_absolute` is what a single answer may owe to a name.
    """
    found: dict[str, Any] = {}
    for name, swap in SWAPS.items():
        pairs: list[tuple[Group, Group]] = []
        for row in rows:
            for answer in answers_of(row):
                other = [{**turn, "content": swap(turn["content"])} for turn in row.prompt]
                changed = swap(text_of(answer))
                if other != row.prompt or changed != text_of(answer):
                    own = encode_group(model, row.prompt, [answer])
                    exchanged = encode_group(model, other, [[{"role": "assistant", "content": changed}]])  # type: ignore[arg-type]
                    pairs.append((own, exchanged))
        pairs = pairs[:_SWAPPED]
        gaps: list[float] = []
        for start in range(0, len(pairs), size):
            part = pairs[start : start + size]
            before, after = (model.score([pair[side] for pair in part]) for side in (0, 1))
            gaps += ((after - before) / scale).tolist()
        found[name] = {
            "answers": len(gaps),
            "mean": agreement.mean_interval(gaps)._asdict() if gaps else None,
            "mean_absolute": sum(map(abs, gaps)) / len(gaps) if gaps else None,
        }
    return found


def suspects(scored: Scored, limit: int) -> list[dict[str, Any]]:
    """Return the comparisons whose labels the ensemble speaks against most: likely flipped ones.

    They are ordered by the mean gap over members, worst first (Wang et al. 2024, arXiv 2401.06080, section 2). `std` is
    how far the members disagree: a low mean with a low deviation is the strongest sign.
    """
    found: list[dict[str, Any]] = []
    for row, own in zip(scored.rows, scored.members, strict=True):
        if isinstance(row, Comparison) and row.preference > 0.5:
            gaps = own[0] - own[1]
            found.append(
                {
                    "id": row.id,
                    "gap": gaps.mean().item(),
                    "std": gaps.std(correction=0).item(),
                    "preference": row.preference,
                    "source": row.source,
                    "annotator": row.annotator,
                    "chosen": text_of(row.chosen),
                    "rejected": text_of(row.rejected),
                }
            )
    return sorted((row for row in found if row["gap"] < 0), key=lambda row: float(row["gap"]))[:limit]


# --- costs -----------------------------------------------------------------------------------------------------------


def describe_costs(rows: Sequence[Comparison], costs: Sequence[Tensor]) -> dict[str, Any]:
    """Return how often a cost has the sign that people gave, and puts the more harmful answer higher.

    A cost above 0 says unsafe. `unsafe` is the share of unsafe answers among those with a sign: who always says the
    commoner one is right as often as that.
    """
    signs: list[tuple[bool, float]] = []
    orders: list[float] = []
    for row, own in zip(rows, costs, strict=True):
        for label, cost in zip((row.chosen_safe, row.rejected_safe), own.tolist(), strict=True):
            if label is not None:
                signs.append((not label, cost))
        if row.safer is not None and row.safer != 0.5:
            gap = (own[0] - own[1]).item()
            orders.append(_rightness(-gap if row.safer > 0.5 else gap))
    unsafe = [float(cost > 0) for harmful, cost in signs if harmful]
    safe = [float(cost <= 0) for harmful, cost in signs if not harmful]
    return {
        "sign": _rate(unsafe + safe) if signs else None,
        "sign_of_unsafe": _rate(unsafe) if unsafe else None,
        "sign_of_safe": _rate(safe) if safe else None,
        "unsafe": _rate([float(harmful) for harmful, _ in signs]) if signs else None,
        "order": _rate(orders) if orders else None,
        "heldout_rows": len(rows),
    }
