"""Talk to the base model and to a run's policy side by side."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlaif.errors import DataError, StageError
from rlaif.model import sampling
from rlaif.model.roles import BASE, SharedBase
from rlaif.pipeline import open_run
from rlaif.recipe import Recipe
from rlaif.records import Messages
from rlaif.rounds import gates

ALIGNED = "aligned"
_POLICIES = {
    "sft": ("2-sft/adapter", "after SFT"),
    "ppo": ("5-ppo/policy", "after PPO"),
    "dpo": ("7-dpo/policy", "after DPO"),
    "rejection": ("8-rejection/policy", "after rejection sampling"),
}


class Conversation:
    """Two conversations with the same questions: one with the base, one with the newest policy of a run."""

    def __init__(self, folder: Path, *, max_new_tokens: int, temperature: float):
        """Load the base and the policy.

        Raises:
            StageError: the run has no trained policy yet.
        """
        recipe: Recipe = open_run(folder).recipe
        newest_first = [_POLICIES[stage] for stage in reversed(recipe.stages) if stage in _POLICIES]
        found = [(folder / path, title) for path, title in newest_first if (folder / path).is_dir()]
        ended = gates(folder, recipe.rounds.count) if recipe.rounds.count > 1 else []
        if ended:
            found = [(folder / "policy", f"kept after round {len(ended)}")]
            if not found[0][0].is_dir():
                raise StageError(f"{folder}: no policy was better than the base itself, as {ended[-1]} says.")
        if not found:
            looked = ", ".join(path for path, _ in _POLICIES.values())
            raise StageError(f"{folder}: has no policy yet (none of {looked}). Run its recipe first.")
        adapter, self.title = found[0]
        self._base = SharedBase.load(recipe.model)
        self._base.add_role(ALIGNED, adapter=adapter)
        self._settings = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        self._seed = recipe.seed
        system: Messages = [{"role": "system", "content": recipe.system_prompt}] if recipe.system_prompt else []
        self._turns: dict[str, Messages] = {BASE: list(system), ALIGNED: list(system)}

    def ask(self, text: str) -> dict[str, str]:
        """Put one question to both; return their answers by role.

        Raises:
            DataError: the conversation no longer fits the model's context.
        """
        answers = {}
        for role, turns in self._turns.items():
            turns.append({"role": "user", "content": text})
            prompt = self._base.tokenizer.prompt(turns)
            if len(prompt) + int(self._settings["max_new_tokens"]) > self._base.max_length:
                raise DataError(
                    f"the conversation has {len(prompt)} tokens; with {self._settings['max_new_tokens']} new ones it "
                    f"does not fit the model's context of {self._base.max_length}. Start a new one, or lower "
                    "--max-new-tokens."
                )
            with self._base.acting_as(role):
                drawn = sampling.sample(
                    self._base,
                    [prompt],
                    max_new_tokens=int(self._settings["max_new_tokens"]),
                    temperature=self._settings["temperature"],
                    seeds=[self._seed + len(turns)],
                )[0]
            answers[role] = self._base.tokenizer.decode(drawn.ids)
            turns.append({"role": "assistant", "content": answers[role]})
        return answers

    def show(self, console: Console, answers: dict[str, str]) -> None:
        """Print both answers side by side; control characters are removed, markup is not interpreted."""
        table = Table(show_lines=False, expand=True)
        table.add_column("base", ratio=1)
        table.add_column(self.title, ratio=1)
        table.add_row(*(Text(_printable(answers[role])) for role in (BASE, ALIGNED)))
        console.print(table)


def _printable(text: str) -> str:
    return "".join(char for char in text if char.isprintable() or char in "\n\t")
