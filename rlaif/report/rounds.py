"""The rounds of a run: what each of them learned from and came to, and what its gate decided."""

from dataclasses import dataclass
from pathlib import Path

from rlaif.recipe import FOLDERS
from rlaif.report.labels import Mean, Part, Rate
from rlaif.report.reading import Manifest, folder_of, newest_round, read_object
from rlaif.report.wording import NONE, count, mean, percent, policy_name, rate
from rlaif.rounds import GATE, OPTIMIZERS, round_folder


class Named(Part):
    """A policy as ``gate.json`` names it."""

    stage: str
    round: int


class GateCost(Part):
    """What the answers of a round's policy cost beside the limit of PPO's constraint."""

    threshold: float
    mean: Mean | None = None

    @property
    def compared(self) -> str:
        """The mean with its interval and the limit, to be said after the comparison; empty where nothing has a cost."""
        return f"; cost {mean(self.mean)}, at most {self.threshold:g}" if self.mean else ""


class Gate(Part):
    """``gate.json`` of a round."""

    gate: str
    rule: str
    reason: str
    n: int
    new: Named
    old: Named
    kept: Named
    rate: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    dropped_below: float | None = None
    cost: GateCost | None = None

    @property
    def compared(self) -> str:
        """The figures with their intervals, or why there are none."""
        return self._better + (self.cost.compared if self.cost else "")

    @property
    def _better(self) -> str:
        if self.rate is not None:
            wins = f"wins {rate(Rate(n=self.n, rate=self.rate, low=self.low, high=self.high))} of {self.n}"
            if self.dropped_below is None:
                return wins
            return wins + (f"; dropped below {percent(self.dropped_below)}" if self.dropped_below > 0 else "; too few")
        if self.difference is None:
            return self.reason
        spread = "" if self.low is None or self.high is None else f"\u00a0[{self.low:+.2f},\u00a0{self.high:+.2f}]"
        return f"score {self.difference:+.2f}{spread} on {self.n}"


@dataclass(frozen=True)
class Round:
    """One round; None where a figure is not known, or not yet."""

    number: int
    comparisons: int | None
    replayed: int | None
    heldout_accuracy: float | None
    new_pairs_right_before: float | None
    new_pairs_right: float | None
    score: float | None
    kl: float | None
    gate: Gate | None

    @property
    def labels(self) -> str:
        """How many comparisons the round has, and how many of earlier rounds it learned again."""
        own = NONE if self.comparisons is None else count(self.comparisons)
        return f"{own} + {count(self.replayed)}" if self.replayed else own

    @property
    def kept(self) -> str:
        """The policy that went on, in words."""
        if self.gate is None:
            return ""
        kept = self.gate.kept
        whose = policy_name(kept.stage) + (f" of round {kept.round}" if kept.stage in OPTIMIZERS else "")
        return f"{whose}, the {'new' if kept == self.gate.new else 'old'} one"


def read_rounds(run_folder: Path, last: int) -> list[Round]:
    """Return the rounds up to the newest; none of a run that has a single one.

    Raises:
        DataError: a file of a round is damaged.
    """
    found = []
    for number in range(1, newest_round(run_folder, last) + 1 if last > 1 else 1):
        places = {stage: folder_of(run_folder, stage, number) / "manifest.json" for stage in FOLDERS}
        counts = {stage: read_object(path, Manifest).counts for stage, path in places.items() if path.is_file()}
        label, reward, ppo = (counts.get(stage, {}) for stage in ("label", "reward", "ppo"))
        gate = round_folder(run_folder, number) / GATE
        found.append(
            Round(
                number,
                label.get("comparisons"),
                reward.get("replayed"),
                reward.get("heldout_accuracy"),
                reward.get("new_pairs_right_before"),
                reward.get("new_pairs_right"),
                ppo.get("last_score"),
                ppo.get("last_kl_to_reference"),
                read_object(gate, Gate) if gate.is_file() else None,
            )
        )
    return found
