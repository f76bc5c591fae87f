"""PPO-ptx: plain text learned beside PPO, so that the policy does not forget it (Ouyang et al. 2022, arXiv 2203.02155).

Equation 2 there adds the log-likelihood of pretraining text to PPO's objective. Here its mean over tokens is added, at
temperature 1, times `ptx_coef`; with an adapter the gradient reaches only the adapter. Which chunks an optimizer step
sees is a function of a seed, so that a resumed run sees the same.

Some chunks are held out: nothing is learned from them, and their loss, which says what is forgotten, is logged. With a
`ptx_coef` of 0 that is all the text is for.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rlaif.documents import read_text
from rlaif.errors import DataError
from rlaif.model.roles import SharedBase
from rlaif.ppo_section import PpoSection
from rlaif.records import read_jsonl
from rlaif.stages import shares
from rlaif.stages.checkpoints import POLICY
from rlaif.stages.run import Run


class Ptx(NamedTuple):
    """The text: chunks of token ids, none across two documents."""

    base: SharedBase
    chunks: list[list[int]]  # to learn from
    heldout: list[list[int]]

    @classmethod
    def load(cls, run: Run, base: SharedBase) -> "Ptx | None":
        """Read a run's text; None where it has none.

        Raises:
            DataError: the file holds no text, or a chunk does not fit the model's context.
        """
        settings, path = run.recipe.ppo, run.loaded.ptx_file
        if path is None:
            return None
        if settings.ptx_length > base.max_length:
            raise DataError(
                f"ppo.ptx_length is {settings.ptx_length}; the model's context holds {base.max_length} tokens. Lower "
                "ptx_length."
            )
        chunks = [chunk for text in read_texts(path) for chunk in cut(base, text, settings.ptx_length)]
        if not chunks:
            raise DataError(f"{path}: no text of at least two tokens, and it is ppo.ptx_file. Give it a text.")
        apart = min(settings.ptx_heldout, len(chunks) // 2)
        seed = torch.Generator().manual_seed(run.seed("ptx", "heldout"))
        order = torch.randperm(len(chunks), generator=seed).tolist()
        return cls(base, [chunks[place] for place in order[apart:]], [chunks[place] for place in order[:apart]])

    def draw(self, seed: int, count: int) -> list[list[int]]:
        """Return so many chunks, drawn with replacement."""
        draws = torch.randint(len(self.chunks), (count,), generator=torch.Generator().manual_seed(seed))
        return [self.chunks[index] for index in draws.tolist()]

    @torch.no_grad()
    def figures(self, microbatch: int) -> dict[str, float]:
        """Return the policy's loss on the chunks held out, in nats per token; nothing where there are none."""
        if not self.heldout:
            return {}
        own, total = list(shares.own(self.heldout)), 0.0
        for start in range(0, len(own), microbatch):
            with self.base.acting_as(POLICY):
                total += summed_loss(self.base, own[start : start + microbatch]).item()
        targets = sum(len(chunk) - 1 for chunk in self.heldout)
        return shares.added({"ptx/heldout_loss": total / targets})

    def backward(self, seed: int, settings: PpoSection) -> float:
        """Add the gradients of one optimizer step's text to the policy's; return its loss in nats per token."""
        chosen = self.draw(seed, settings.ptx_batch)
        targets = sum(len(chunk) - 1 for chunk in chosen)
        total = 0.0
        own = list(shares.own(chosen))
        for start in range(0, len(own), settings.microbatch):
            with self.base.acting_as(POLICY, training=True):
                loss = summed_loss(self.base, own[start : start + settings.microbatch]) / targets
                torch.autograd.backward(settings.ptx_coef * loss)
            total += loss.item()
        return total


def ptx_files(run: Run) -> dict[str, Path]:
    """Return the text of a run, for the inputs of the stage; nothing where it has none."""
    path = run.loaded.ptx_file
    return {"ptx": path} if path else {}


def read_texts(path: Path) -> list[str]:
    """Return the documents of a file: each line's `text` of JSON lines (`.jsonl`, `.jsonl.gz`), else the whole file.

    Raises:
        DataError: it cannot be read, or a line has no text.
    """
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        return [read_text(path, DataError)]
    texts = []
    for number, row in read_jsonl(path):
        if not isinstance(row.get("text"), str):
            raise DataError(
                f"{path}:{number}: no column `text` that holds a string; found {', '.join(row) or 'nothing'}. Rename "
                "the column, or give a plain text file."
            )
        texts.append(row["text"])
    return texts


def cut(base: SharedBase, text: str, length: int) -> list[list[int]]:
    """Cut a document into chunks of so many tokens, each begun as the tokenizer begins a text; the last is shorter."""
    own = base.tokenizer.raw("")["input_ids"]
    begin = own[:1] if own[:1] == [base.tokenizer.raw.bos_token_id] else []
    ids, step = base.tokenizer.response(text, ended=False), length - len(begin)
    chunks = [begin + ids[start : start + step] for start in range(0, len(ids), step)]
    return [chunk for chunk in chunks if len(chunk) > 1]


def summed_loss(base: SharedBase, chunks: list[list[int]]) -> Tensor:
    """Return the acting role's negative log-likelihood of chunks, each token after its first one, summed, in nats."""
    width, pad = max(map(len, chunks)), base.tokenizer.pad_id
    ids = torch.tensor([chunk + [pad] * (width - len(chunk)) for chunk in chunks], device=base.device)
    mask = torch.tensor([[1] * len(chunk) + [0] * (width - len(chunk)) for chunk in chunks], device=base.device)
    positions = torch.arange(width, device=base.device).expand_as(ids)
    hidden = base.trunk(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    real = mask[:, 1:].bool()
    return torch.nn.functional.cross_entropy(base.logits(hidden[:, :-1][real]), ids[:, 1:][real], reduction="sum")
