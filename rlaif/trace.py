"""A row's ancestry: from any row that a stage wrote back to the sentence of the constitution that caused it.

`trace` finds the row in the files of a run folder and follows what its provenance names: the chain, each critique and
revision with the model's answer in the journal, the principle with its place in the constitution, the prompt. Answers
are found by their text, so an answer that was asked for again under other words is not taken for the one that was used.
Nothing is written. Where the constitution or a prompt is not what it was, the tree says so.
"""

import difflib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from rlaif import constitution as constitutions
from rlaif.constitution import Placed
from rlaif.endpoints import BASE
from rlaif.engines.engine import Answer
from rlaif.errors import ConstitutionError, DataError
from rlaif.journal import Unit
from rlaif.pipeline import journal_copy, open_run
from rlaif.principles import Principle
from rlaif.progress import Progress
from rlaif.prompt_sets import line_of
from rlaif.records import read_jsonl, text_of
from rlaif.rounds import ONCE
from rlaif.stages.gate import KEPT, first_policy, kept_policy, newest_policy, starting_policy
from rlaif.stages.revise import unquoted, whole_sentences
from rlaif.stages.run import Run, path_sha256
from rlaif.tree import Node

# Where rows with an id stand, and what one is called.
_FILES = (
    ("ppo", "samples.jsonl", "PPO sample"),
    ("rejection", "responses.jsonl", "sample to choose from"),
    ("evaluate", "responses.jsonl", "response of the evaluation"),
    ("label", "comparisons.jsonl", "comparison"),
    ("label", "ratings.jsonl", "rating"),
    ("label", "rankings.jsonl", "ranking"),
    ("label", "unused.jsonl", "pair set aside"),
    ("revise", "demonstrations.jsonl", "demonstration"),
    ("revise", "quarantine.jsonl", "demonstration set aside"),
    ("revise", "chains.jsonl", "chain"),
)
_ASKING = ("revise", "label", "rejection", "evaluate")
_WHY = {"sft": "where the policy began", "reward": "what it was rewarded by"}


def trace(folder: Path, row_id: str) -> list[Node]:
    """Return the ancestry of each row of a run that has this id.

    Raises:
        DataError: no row has it; ids that look alike are named.
        JournalError: not a run folder, or a damaged journal.
    """
    loaded = open_run(folder)
    with journal_copy(folder) as book:
        run = Run(loaded, folder, book, Progress(quiet=True))
        rounds = [run.in_round(number) for number in range(1, loaded.recipe.rounds.count + 1)]
        found = [node for one in rounds for node in _Ancestry(one).rows(row_id)]
    if found:
        return found
    files = {one.stage_folder(stage) / name for one in rounds for stage, name, _ in _FILES}
    known = {str(row.get("id")) for path in files for _, row in _rows(path)}
    near = difflib.get_close_matches(row_id, sorted(known), n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(f'`{one}`' for one in near)}?" if near else "Ids stand in the rows' column `id`."
    raise DataError(f"{folder}: no row has the id `{row_id}`, in any of {len(known)} rows of its stages. {hint}")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    return read_jsonl(path) if path.is_file() else iter(())


class _Ancestry:
    """Builds nodes from the files, the journal and the constitution of one round of a run."""

    def __init__(self, run: Run):
        self._run = run
        self._units = {stage: list(run.journal.known(stage).values()) for stage in _ASKING}
        self._chains = {str(row["id"]): (line, row) for line, row in self._stage_rows("revise", "chains.jsonl")}

    def _stage_rows(self, stage: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
        return _rows(self._run.stage_folder(stage) / name)

    def _place(self, stage: str, name: str, line: int) -> str:
        return f"{self._in_run(self._run.stage_folder(stage))}/{name}:{line}"

    def _in_run(self, path: Path) -> str:
        return path.relative_to(self._run.folder).as_posix()

    def rows(self, row_id: str) -> list[Node]:
        """Return a node for each row of this round with this id; the first round has those of stages that run once."""
        found = []
        for stage, name, what in _FILES:
            if stage in ONCE and self._run.round > 1:
                continue
            for line, row in self._stage_rows(stage, name):
                if row.get("id") == row_id:
                    found.append(self._row(what, row, self._place(stage, name, line)))
        return found

    def _row(self, what: str, row: dict[str, Any], where: str) -> Node:
        if what in ("PPO sample", "sample to choose from", "response of the evaluation"):
            return self._of_policy(what, row, where)
        if what == "comparison":
            return self._comparison(row, where)
        if what.startswith("demonstration"):
            return self._demonstration(what, row, where)
        if what == "chain":
            return self._chain(row, where, len(row["steps"]))
        facts: dict[str, Any] = {key: row[key] for key in ("reason", "rating", "ranks", "annotator") if key in row}
        answers = row.get("responses") or [row["response"]] * ("response" in row)
        text = " | ".join(row.get("texts") or map(text_of, answers))
        return Node(what, str(row["id"]), where, facts, text, sources=_by_a_person(row.get("provenance", {})))

    # --- rows ---------------------------------------------------------------------------------------------------

    def _of_policy(self, what: str, row: dict[str, Any], where: str) -> Node:
        """A policy's answer comes from the prompt, and from what the policy and its reward were trained on."""
        keys = ("policy", "update", "seed", "score", "kl", "refused", "sample", "best")
        facts = {key: row[key] for key in keys if row.get(key) is not None}
        node = Node(what, str(row["id"]), where, facts, row.get("response", row.get("text", "")))
        prompt_id = str(row["prompt_id"])
        node.sources.append(self._prompt(prompt_id))
        if what == "response of the evaluation":
            node.sources += self._answers("evaluate", f"{prompt_id}/eval", row["text"], "answer")
        elif what == "sample to choose from":
            node.sources += self._answers("rejection", f"{prompt_id}/rejection", row["response"], "answer")
        if row.get("policy") == KEPT:
            kept = kept_policy(self._run)
            node.sources += _Ancestry(self._run.in_round(kept.round))._training(kept.stage, prompt_id)
        elif row.get("policy") != BASE:
            node.sources += self._training(row.get("policy", "ppo"), prompt_id)
        return node

    def _training(self, policy: str, prompt_id: str) -> list[Node]:
        """Return the adapters that made a policy what it is, each with the rows of one prompt that it learned from."""
        start = first_policy(self._run) if policy == "sft" else starting_policy(self._run, policy)
        trained, nodes = [], []
        if start.stage == "sft":
            trained.append(("sft", "adapter", "demonstrations.jsonl", "revise", "demonstration"))
        elif start.adapter:
            began = Node(f"{start.stage} adapter: {_WHY['sft']}", "", self._in_run(start.adapter))
            began.sources = _Ancestry(self._run.in_round(start.round))._training(start.stage, prompt_id)
            nodes.append(began)
        if policy in ("ppo", "rejection"):
            trained.append(("reward", "adapter", "comparisons.jsonl", "label", "comparison"))
        if policy == "rejection":
            trained.append(("rejection", "policy", "responses.jsonl", "rejection", "sample to choose from"))
        if policy == "dpo":
            trained.append(("dpo", "policy", "comparisons.jsonl", "label", "comparison"))
        for stage, place, name, source, kind in trained:
            if stage not in self._run.recipe.stages:
                continue
            of = _WHY.get(stage, "the policy itself")
            path = self._run.stage_folder(stage) / place
            adapter = Node(f"{stage} adapter: {of}", "", self._in_run(path), {"sha256": path_sha256(path)[:16]})
            rows = list(self._stage_rows(source, name))
            adapter.facts["trained on"] = f"{len(rows)} rows of {self._in_run(self._run.stage_folder(source))}/{name}"
            own = [(line, one) for line, one in rows if _prompt_id(one) == prompt_id]
            adapter.sources = [self._row(kind, one, self._place(source, name, line)) for line, one in own]
            adapter.note = "" if own else "none of these rows is of this prompt"
            nodes.append(adapter)
        return nodes

    def _comparison(self, row: dict[str, Any], where: str) -> Node:
        origin, votes = row["provenance"], row["votes"]
        facts = {key: row[key] for key in ("source", "annotator", "preference", "split")}
        node = Node("comparison", str(row["id"]), where, facts, note=self._constitution_note(origin))
        prompt_id = str(origin.get("prompt_id", ""))
        for vote in votes:
            node.sources.append(self._vote(vote, prompt_id, origin))
        chain = self._chains.get(prompt_id)
        for side in ("chosen", "rejected"):
            text = text_of(row[side])
            part = Node(side, text=text)
            steps = [step["revision"] for step in chain[1]["steps"]] if chain else []
            if chain and text in (chain[1]["response"], *steps):
                count = 0 if text == chain[1]["response"] else steps.index(text) + 1
                part.sources = [self._chain(chain[1], self._place("revise", "chains.jsonl", chain[0]), count)]
            else:
                part.sources = self._answers("label", f"{prompt_id}/", text, "answer") if prompt_id else []
            node.sources.append(part)
        if prompt_id:
            node.sources.append(self._prompt(prompt_id, row["prompt"]))
        else:
            node.sources += _by_a_person(origin)
        return node

    def _vote(self, vote: dict[str, Any], prompt_id: str, origin: dict[str, Any]) -> Node:
        facts = {key: value for key, value in vote.items() if key not in ("principle", "critique")}
        node = Node("vote", facts=facts, text=vote.get("critique", ""))
        for logit in vote.get("logits", ()):
            node.sources += self._verdicts(prompt_id, logit)
        if vote.get("critique"):
            chain = self._chains.get(prompt_id)  # whose critique it is, or one of a needless refusal
            steps = chain[1]["steps"] if chain else []
            stage = "revise" if any(step["critique"] == vote["critique"] for step in steps) else "label"
            node.sources += self._answers(stage, f"{prompt_id}/critique", vote["critique"], "critique")
        if vote.get("principle"):
            known = origin.get("principle_hash") if vote["principle"] == origin.get("principle") else None
            key = "comparison" if "logits" in vote else "revision"
            node.sources.append(self._principle(vote["principle"], known, key, origin))
        return node

    def _demonstration(self, what: str, row: dict[str, Any], where: str) -> Node:
        origin = row["provenance"]
        facts = {key: row[key] for key in ("tag", "flags", "reason", "duplicate_of") if row.get(key)}
        facts["constitution"] = origin.get("constitution")
        note = self._constitution_note(origin)
        node = Node(what, str(row["id"]), where, facts, text_of(row["completion"]), note)
        found = self._chains.get(str(origin.get("chain_id", origin["prompt_id"])))
        if found:
            place = self._place("revise", "chains.jsonl", found[0])
            node.sources.append(self._chain(found[1], place, len(row["revisions"]) - 1))
        return node

    def _chain(self, row: dict[str, Any], where: str, steps: int) -> Node:
        """Return a chain up to one of its steps, the latest first."""
        facts = {"kept": row["kept"], "reason": row["reason"]} if not row["kept"] else {}
        node = Node("chain", str(row["id"]), where, facts)
        prompt_id = str(row["prompt_id"])
        for number, step in reversed(list(enumerate(row["steps"][:steps]))):
            part = Node(f"revision {number + 1}", text=step["revision"])
            part.sources = self._answers("revise", f"{prompt_id}/revise-{number}", step["revision"], "answer")
            if step["critique"]:
                critique = Node(f"critique {number + 1}", text=step["critique"])
                critique.sources = self._answers("revise", f"{prompt_id}/critique-{number}", step["critique"], "answer")
                critique.sources.append(self._principle(step["principle"], step.get("principle_hash"), "critique"))
                part.sources.append(critique)
            part.sources.append(self._principle(step["principle"], step.get("principle_hash"), "revision"))
            node.sources.append(part)
        response = Node("response", text=row["response"])
        response.sources = self._answers("revise", f"{prompt_id}/response", row["response"], "answer")
        node.sources += [response, self._prompt(prompt_id)]
        return node

    @cached_property
    def _entries(self) -> list[Placed] | str:
        """The entries of the constitution as it is now, file by file, or why it cannot be read."""
        try:
            reading = constitutions.read(self._run.loaded.constitution)
        except ConstitutionError as problem:
            return str(problem)
        return reading.entries if not reading.problems else str(reading.problems[0])

    # --- what rows come from ------------------------------------------------------------------------------------

    def _answers(self, stage: str, item: str, text: str, what: str) -> list[Node]:
        """Return the stored answers that begin with this id and have this text; most often one."""
        units = [u for u in self._units[stage] if u.item_id.startswith(item) and text in _forms(u)]
        if not units:
            return [Node(what, item, note="not in the journal (any more)")]
        nodes = [self._unit(stage, unit, what) for unit in units]
        for node in nodes if len(nodes) > 1 else []:
            node.note = f"one of {len(nodes)} stored answers with this very text; any of them may have been used"
        return nodes

    def _verdicts(self, prompt_id: str, logit: float) -> list[Node]:
        mine = (u for u in self._units["label"] if u.item_id.startswith(prompt_id) and "/exchanged/" not in u.item_id)
        read = [(u, u.result.get("logprobs", ())) for u in mine]  # under `/exchanged/` stands the swap test
        units = [u for u, logprobs in read if len(logprobs) > 1 and abs(logprobs[0] - logprobs[1] - logit) < 1e-6]
        return [self._unit("label", unit, "judgement") for unit in units]

    def _unit(self, stage: str, unit: Unit, what: str) -> Node:
        sampled = unit.item_id.endswith(("response", "contrast")) and not unit.result.get("logprobs")
        adapter = None
        if stage == "rejection":
            adapter = newest_policy(self._run, stage).adapter
        elif stage != "revise" and sampled:
            adapter = kept_policy(self._run).adapter
        drawn = (unit.item_id, unit.sample)
        facts = {
            "request": unit.request_hash[:16],
            "model": self._run.model_of(self._asked(stage, unit)),
            "adapter": path_sha256(adapter)[:16] if adapter and adapter.is_dir() else "none",
            "seed": self._run.in_round(1 if stage in (*ONCE, "evaluate") else self._run.round).seed(*drawn),
            "sample": unit.sample,
            "tokens": unit.tokens,
        }
        return Node(what, unit.item_id, f"journal.db {stage}", facts)

    def _asked(self, stage: str, unit: Unit) -> str:
        """Return the name of the engine that answered, as the recipe has it."""
        names, part = self._run.recipe.revise, unit.item_id.rpartition("/")[2].partition("-")[0]
        if unit.result.get("logprobs"):
            return self._run.recipe.label.judge
        known = {"critique": names.critic, "revise": names.reviser}
        return known.get(part, names.responder if stage == "revise" else BASE)

    def _prompt(self, prompt_id: str, shown: Any = None) -> Node:
        for path in self._run.loaded.prompts:
            line = line_of(path, prompt_id) if path.is_file() else None
            if line is not None:
                now = next((prompt for prompt in self._run.prompts if prompt.id == prompt_id), None)
                same = shown is None or now is None or now.messages == shown
                note = "" if same else "the prompt has another text now"
                return Node("prompt", prompt_id, f"{path}:{line}", {}, now.prompt if now else "", note)
        return Node("prompt", prompt_id, note="not in the recipe's prompt sets any more")

    def _principle(self, identifier: str, known: str | None, key: str, origin: dict[str, Any] | None = None) -> Node:
        """Return a principle with the place of its sentence, and whether it is what the row was made under."""
        node = Node("principle", identifier)
        if isinstance(self._entries, str):
            node.note = f"the constitution cannot be read now: {self._entries}"
            return node
        for placed in reversed(self._entries):  # an entry of a later file replaces those of the files it extends
            principle = placed.entry
            if not isinstance(principle, Principle) or principle.id != identifier:
                continue
            node.where, node.text = placed.problem("text", "", "").place, principle.text
            asked = placed.problem(key, "", "").place if getattr(principle, key) else "built from the text"
            node.facts = {f"{key} asked with": asked, "hash": principle.hash[:16]}
            if known is not None and known != principle.hash:
                node.note = f"REWORDED SINCE: this row was made under other words (hash {known[:16]})"
            elif known is None and origin and self._constitution_note(origin):
                node.note = "whether this principle was reworded since is not recorded; the constitution was"
            return node
        node.note = "NO LONGER IN THE CONSTITUTION"
        return node

    def _constitution_note(self, origin: dict[str, Any]) -> str:
        known = origin.get("constitution_hash")
        if known is None:
            return ""
        if isinstance(self._entries, str):
            return "the constitution cannot be read now"
        now = self._run.constitution
        hashes = {now.hash_of("principles", "examples"), now.hash_of("principles", "examples", "comparisons")}
        return "" if known in hashes else "the constitution has changed since this row was made"


def _prompt_id(row: dict[str, Any]) -> Any:
    return row["provenance"].get("prompt_id") if "provenance" in row else row["prompt_id"]


def _by_a_person(origin: dict[str, Any]) -> list[Node]:
    """Return the line of the file that a person's label came from."""
    where = f"{origin.get('file')}:{origin.get('line', '')}"
    return [Node("label by a person", "", where, origin)] if "file" in origin else []


def _forms(unit: Unit) -> set[str]:
    """Return the texts in which a stage may have used a stored answer."""
    stored = unit.result
    whole, _ = whole_sentences(Answer(text=stored.get("text", ""), ended=stored.get("ended", True)))
    return {stored.get("text", ""), whole, unquoted(whole)}
