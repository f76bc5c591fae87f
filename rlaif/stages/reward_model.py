"""A trained reward model: one adapter or several on the shared base, each with one head or several.

Every output of a head is a *member*. Members are brought to the scale of the responses that the model was measured on,
and then put together: their mean, the worst, or the mean less a multiple of their variance (Coste et al. 2024, arXiv
2310.02743). A model with one member gives that member's number as it is.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlaif.errors import DataError, StageError
from rlaif.maths.composition import mean_score, uncertainty_weighted, worst_score
from rlaif.model import sampling
from rlaif.model.groups import Group, score_groups
from rlaif.model.roles import SharedBase
from rlaif.records import Messages, Prompt, assistant, text_of
from rlaif.sections import Combination
from rlaif.stages import shares

REWARD, COST = "reward", "cost"
CALIBRATION = "calibration.json"


class Scale(NamedTuple):
    """Mean and standard deviation of a member's scores on reference responses."""

    offset: float
    scale: float


def roles_of(role: str, adapters: int) -> list[str]:
    """Return the names of an ensemble's roles: ``reward``, ``reward-2``, ..."""
    return [role, *(f"{role}-{number}" for number in range(2, adapters + 1))]


def part_folder(stage: Path, role: str) -> Path:
    """Return where the stage `reward` keeps a role: its own folder for the reward, one below it for others."""
    return stage if role == REWARD else stage / role


def closed(base: SharedBase, batch: sampling.Batch) -> list[Group]:
    """Return the rows of a batch, with the end of a turn after each response that was cut off.

    A reward model learns from answers that have ended. At any other token its number means nothing (Huang et al. 2024,
    arXiv 2403.17031, details 12 and 13), and a policy would be paid for being cut off at the right word.
    """
    width = batch.ids.shape[1] - batch.response_ids.shape[1]
    groups = []
    for ids, mask in zip(batch.ids, batch.mask.bool(), strict=True):
        prompt, response = ids[:width][mask[:width]].tolist(), ids[width:][mask[width:]].tolist()
        ended = response and response[-1] in base.tokenizer.eos_ids
        groups.append(Group(prompt, [response if ended else [*response, base.tokenizer.end_of_turn]]))
    return groups


class RewardModel:
    """What scores responses; its roles are on the shared base."""

    def __init__(self, base: SharedBase, roles: Sequence[str], scales: Sequence[Scale], combination: Combination):
        """Put a model together from roles that the base has.

        Args:
            base: the shared base.
            roles: the adapters with heads that take part.
            scales: one a member, in the order of the roles and their outputs.
            combination: how members become one score.
        """
        self.base, self.roles, self.scales, self.combination = base, list(roles), list(scales), combination
        self._columns: list[int] | None = None  # members of the roles that count; None: all

    @classmethod
    def load(cls, base: SharedBase, stage: Path, combination: Combination, role: str = REWARD) -> "RewardModel":
        """Load what the stage `reward` wrote.

        Raises:
            StageError: the folder holds no trained adapter of this role.
        """
        measured = read_calibration(part_folder(stage, role))
        roles = roles_of(role, len(list(stage.glob(f"{role}-[0-9]*"))) + 1)
        for name in roles:
            base.add_role(name, adapter=part_folder(stage, name) / "adapter")
        scales = [Scale(one["offset"], one["scale"]) for one in measured["members"]]
        return cls(base, roles, scales, combination)

    def only(self, *numbers: int) -> "RewardModel":
        """Return the model of some members alone, numbered from 1 over roles and their outputs."""
        heads = [(role, place) for role in self.roles for place in range(len(self.base.head_weight(role)))]
        kept = [heads[number - 1] for number in numbers]
        roles = [role for role in self.roles if role in dict(kept)]
        within = [one for one in heads if one[0] in roles]
        part = RewardModel(self.base, roles, [self.scales[number - 1] for number in numbers], self.combination)
        part._columns = [within.index(one) for one in kept]
        return part

    @torch.no_grad()
    def members(self, batch: sampling.Batch | Sequence[Group]) -> Tensor:
        """Return each member's score of each response, ``[B, M]``, fp32, on the members' own scales.

        The responses of a batch are closed where they were cut off; those of groups must be.
        """
        groups = closed(self.base, batch) if isinstance(batch, sampling.Batch) else batch
        parts = []
        for role in self.roles:
            with self.base.acting_as(role):
                scores = score_groups(self.base, role, groups)
            parts.append(scores if scores.dim() == 2 else scores.unsqueeze(1))
        found = torch.cat(parts, 1)
        return found if self._columns is None else found[:, self._columns]

    def combine(self, members: Tensor) -> Tensor:
        """Make one score of each row of members: ``[B, M]`` to ``[B]``."""
        if members.shape[1] == 1:
            return members[:, 0]
        offset, scale = (members.new_tensor(column) for column in zip(*self.scales, strict=True))
        standard = (members - offset) / scale
        if self.combination.ensemble == "uncertainty":
            return uncertainty_weighted(standard, self.combination.uncertainty_coef)
        return worst_score(standard) if self.combination.ensemble == "worst" else mean_score(standard)

    def score(self, batch: sampling.Batch | Sequence[Group]) -> Tensor:
        """Return one score of each response, ``[B]``."""
        return self.combine(self.members(batch))

    @shares.by_rows
    def score_responses(
        self,
        base: SharedBase,
        rows: Sequence[Prompt],
        responses: Sequence[str],
        batch: sampling.Batch,
        size: int,
    ) -> Tensor:
        """Return one score of each response of a policy, ``[B]``, in passes over so many.

        Args:
            base: the policy's base. A model that stands on it reads its ids; one on a base of its own, with another
                vocabulary, reads the texts.
            rows: ``B`` prompts.
            responses: the texts of the responses to them.
            batch: the same, packed.
            size: rows in a pass.

        Raises:
            DataError: a response does not fit the context of a model on a base of its own.
            StageError: a score that is not a finite number.
        """
        parts: Sequence[sampling.Batch | Sequence[Group]]
        if self.base is base:
            parts = sampling.in_microbatches(batch, size)
        else:
            pairs = zip(rows, responses, strict=True)
            groups = [encode_group(self, row.messages, [assistant(text)]) for row, text in pairs]
            self._refuse_long(rows, groups)
            parts = [groups[start : start + size] for start in range(0, len(groups), size)]
        scores = torch.cat([self.score(part) for part in parts]).to(batch.ids.device)
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        if bad:
            where = f" (to `{rows[bad[0]].id}`)" if rows else ""
            raise StageError(
                f"the reward model ({', '.join(self.roles)}) gives response {bad[0] + 1}{where} the score "
                f"{scores[bad[0]].item()}; {len(bad)} of {len(scores)} scores are not finite. Nothing was learned "
                "from them. Run the stage `reward` again with a lower reward.learning_rate, or load the model in "
                "another precision (model.dtype)."
            )
        return scores

    def _refuse_long(self, rows: Sequence[Prompt], groups: Sequence[Group]) -> None:
        for row, group in zip(rows, groups, strict=True):
            length = len(group.prompt) + max(map(len, group.responses))
            if length > self.base.max_length:
                raise DataError(
                    f"`{row.id}`: prompt and response have {length} tokens of the reward model's tokenizer; its "
                    f"context holds {self.base.max_length}. Shorten the prompt, lower ppo.sampling.max_new_tokens, or "
                    "take a reward.model with a longer context."
                )

    @property
    def scale(self) -> Scale:
        """Offset and scale of what `score` gives on the reference responses: those of a single member, else 0 and 1."""
        return self.scales[0] if len(self.scales) == 1 else Scale(0.0, 1.0)

    def critic_start(self) -> tuple[Tensor, float]:
        """Return the weights ``[1, hidden]`` and the offset of a head that gives `score` as the mean of all heads.

        A critic starts as a copy of the first adapter with this head: for one adapter, at temperature-free states, it
        says exactly what the mean of its heads says, ``head(hidden) - offset``.
        """
        weight = self.base.head_weight(self.roles[0]).detach()
        if self._columns is not None:
            weight = weight[[column for column in self._columns if column < len(weight)]]
        scales = self.scales[: len(weight)]
        if len(self.scales) == 1:
            return weight.clone(), 0.0
        divided = weight / weight.new_tensor([one.scale for one in scales]).unsqueeze(1)
        return divided.mean(0, keepdim=True), sum(one.offset / one.scale for one in scales) / len(scales)


def encode_group(model: RewardModel, prompt: Messages, answers: Sequence[Messages]) -> Group:
    """Encode a prompt and answers to it, each closed by the end of a turn."""
    tokenizer = model.base.tokenizer
    return Group(tokenizer.prompt(prompt), [tokenizer.response(text_of(answer)) for answer in answers])


def read_calibration(folder: Path) -> dict[str, Any]:
    """Read ``calibration.json`` of a trained adapter.

    Raises:
        StageError: it is not there.
    """
    path = folder / CALIBRATION
    if (folder / "evaluation.json").is_file() and not path.is_file():
        raise StageError(
            f"{folder}: written by an earlier version (evaluation.json instead of {CALIBRATION}). Run the stage "
            "`reward` again: its labels are kept, and it measures more of the model."
        )
    if not path.is_file():
        raise StageError(
            f"{folder}: holds no trained reward model ({CALIBRATION} is not there). Name a run folder's `4-reward`, or "
            "run the stage `reward` first."
        )
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
