"""What PPO does about what `rlaif.health` finds: it warns once of each kind, or stops with its checkpoint kept.

Numbers that are not finite stop it at once, before they reach a weight.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlaif import health
from rlaif.errors import StageError
from rlaif.records import Prompt, read_jsonl
from rlaif.stages.run import Run
from rlaif.stages.training import METRICS


class Watch:
    """Reads the figures of each update; a resumed run begins with those before its checkpoint."""

    def __init__(self, run: Run):
        """Take over the figures of earlier updates.

        Raises:
            StageError: the run has stopped at what they show, and the recipe still says that it must.
        """
        self._limits, self._say = run.recipe.ppo.health, run.progress.say
        self._rows = [row for _, row in read_jsonl(run.stage_folder("ppo") / METRICS)]
        self.stop()

    def after(self, update: int, figures: dict[str, float]) -> bool:
        """Say what is newly wrong after an update, counted from 0; return whether the run must stop."""
        self._rows.append({"update": update + 1, **figures})
        new = [one for one in health.findings(self._rows, self._limits) if one.update == update + 1]
        for one in new:
            if one.kind not in self._limits.stop:
                self._say(f"  warning: {one}. (ppo.health.{one.kind})")
        return any(one.kind in self._limits.stop for one in new)

    def stop(self) -> None:
        """Stop where something is wrong that the recipe lists in `ppo.health.stop`; the checkpoint is written before.

        Raises:
            StageError: what was found, what was expected, what to do.
        """
        serious = [one for one in health.findings(self._rows, self._limits) if one.kind in self._limits.stop]
        if serious:
            told = "\n".join(f"ppo: {one}." for one in serious)
            kinds = " and ".join(f"`{one.kind}`" for one in serious)
            raise StageError(
                f"{told}\nStopped, because ppo.health.stop lists {kinds}. The checkpoint of update {len(self._rows)} "
                "and all that was written are kept: with other values in ppo.health the run goes on from there; with "
                "another learning rate or reward the stage starts anew. `rlaif report` draws the curves up to here."
            )


def refuse_not_finite(update: int, rows: Sequence[Prompt], **figures: Tensor) -> None:
    """Stop before the optimizer takes a step from a number that is none.

    Args:
        update: counted from 0.
        rows: ``B`` prompts.
        figures: by name, ``[B]`` or ``[B, T]``.

    Raises:
        StageError: the first response with such a number.
    """
    for name, values in figures.items():
        bad = ~torch.isfinite(values)
        if bad.any():
            place = int(bad.reshape(len(rows), -1).any(1).nonzero()[0])
            raise StageError(
                f"ppo: update {update + 1}: {name} of response {place + 1} (to `{rows[place].id}`) "
                f"{'is' if values.dim() == 1 else 'hold'} {values[place][bad[place]].flatten()[0].item()}; finite "
                "numbers are expected. No step was taken from it, and the newest checkpoint is kept. Lower "
                "ppo.learning_rate; in the first update look at the adapters of `sft` and `reward`, or load the model "
                "in another precision (model.dtype)."
            )


def refuse_gradient(update: int, key: str, norm: float) -> None:
    """Stop where a gradient is not finite, before the optimizer takes the step.

    Raises:
        StageError: the metric, the norm, the update (counted from 0) and what to do.
    """
    if not math.isfinite(norm):
        raise StageError(
            f"ppo: update {update + 1}: {key} is {norm}; a finite number is expected. No step was taken from it, and "
            "the newest checkpoint is kept. Lower ppo.learning_rate, or load the model in another precision "
            "(model.dtype)."
        )
