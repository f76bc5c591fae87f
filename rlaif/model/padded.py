"""Generation in padded batches, for models whose attention cannot be replaced: windows, alibi, recurrent layers.

Prompts are padded on the left; rows that are done leave the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from rlaif.model.roles import SharedBase
from rlaif.model.slots import Extend


@torch.no_grad()
def run(base: SharedBase, prompts: Sequence[Sequence[int]], *, slots: int, max_new_tokens: int, extend: Extend) -> None:
    """Run prompts through the acting role until each is done, in batches of similar length; see `slots.run`."""
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    for start in range(0, len(order), slots):
        rows = order[start : start + slots]
        _run_batch(base, rows, [list(prompts[row]) for row in rows], extend)


def _run_batch(base: SharedBase, rows: list[int], prompts: list[list[int]], extend: Extend) -> None:
    width, pad = max(map(len, prompts)), base.tokenizer.pad_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=base.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=base.device)
    cache = DynamicCache(config=base.lm.config)
    while rows:
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        out = base.trunk(input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True)
        logits: Tensor = base.logits(out.last_hidden_state[:, -1])
        following = extend(rows, logits)
        alive = [index for index, token in enumerate(following) if token is not None]
        if alive and len(alive) < len(rows):
            keep = torch.tensor(alive, device=base.device)
            mask = mask[keep]
            cache.batch_select_indices(keep)
        rows = [rows[index] for index in alive]
        ids = torch.tensor([[token] for token in following if token is not None], device=base.device)
        mask = torch.cat([mask[: len(rows)], mask.new_ones(len(rows), 1)], 1)
