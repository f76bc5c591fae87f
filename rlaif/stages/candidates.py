"""Which answers are compared: samples of the policy, revisions, two policies, or pairs from a file.

Each function returns candidates, and the rows that cannot be compared with the reason. Which of two answers is called
`first` is drawn by a hash where it would otherwise tell the judge, or the figures, which side is expected to win.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlaif.constitution import Constitution, Principle, applying, draw
from rlaif.documents import fingerprint
from rlaif.engines.engine import Engine
from rlaif.engines.local import LocalEngine
from rlaif.human.importers import why_unused
from rlaif.human.labels import read_comparisons
from rlaif.model.roles import BASE, SharedBase
from rlaif.prompt_sets import as_text
from rlaif.records import Comparison, Messages, Prompt, Split, assistant, text_of, with_system
from rlaif.stages.chains import chain_row, revised_chains
from rlaif.stages.demonstrations import problem
from rlaif.stages.gate import kept_policy
from rlaif.stages.revise import critique_and_revise, respond, revising_engines
from rlaif.stages.run import Run, path_sha256
from rlaif.stages.verdicts import NO_ANSWER

NAME = "label"
POLICY = "policy"
Unused = list[dict[str, Any]]
Source = Literal["ai", "construction"]


class Candidate(NamedTuple):
    """Two answers to one prompt that a judge may be shown."""

    id: str
    prompt_id: str
    prompt: Messages
    first: str
    second: str
    principles: tuple[Principle, ...]
    tag: str = ""
    split: Split = "train"
    origin: dict[str, Any] = {}  # goes into the row's provenance
    reference: float | None = None  # P(first is better) as people said; no judge is shown it
    text: str = ""  # the prompt as a judge reads it, where that is not all of `prompt`

    @property
    def asked(self) -> str:
        """The prompt as a judge reads it."""
        return self.text or as_text(self.prompt)

    @property
    def exchanged(self) -> "Candidate":
        """The same candidate with its answers in each other's place."""
        return self._replace(id=f"{self.id}/exchanged", first=self.second, second=self.first)


class Engines:
    """The models that this stage asks, loaded when the first of them is."""

    def __init__(self, run: Run, base: SharedBase | None = None, *, batch_size: int | None = None):
        """Load nothing yet, and with `base` nothing later; the batch size is that of `label` unless it is given."""
        self._run, self._given = run, base
        self._size = batch_size or run.recipe.label.batch_size
        self._known: dict[str, LocalEngine] = {}

    @cached_property
    def _base(self) -> SharedBase:
        return self._given or self._run.load_base()

    def named(self, name: str) -> LocalEngine:
        """Return the base model (``base``), the SFT policy (``sft``) or an adapter folder as an engine."""
        if name == BASE:
            return self._known.setdefault(BASE, LocalEngine(self._base, BASE, batch_size=self._size))
        if name == "sft":
            return self._of(self._run.output("sft", "adapter"), POLICY)
        return self._of(self._run.loaded.adapters[name])

    def _of(self, adapter: Path, role: str = "") -> LocalEngine:
        sha256 = path_sha256(adapter)
        role = role or f"adapter-{sha256[:12]}"
        if role not in self._known:
            self._base.add_role(role, adapter=adapter)
            self._known[role] = LocalEngine(self._base, role, batch_size=self._size, adapter=sha256)
        return self._known[role]

    def load(self) -> SharedBase:
        """Return the base model, loaded the first time."""
        return self._base

    def judge(self, name: str, *, chooses: bool) -> Engine:
        """Return the base model or a server as a judge."""
        return self._run.engine(name, self.load, batch_size=self._size, chooses=chooses)

    def policy(self) -> LocalEngine:
        """Return the policy that this round starts from: at first SFT's, without an SFT stage the base model."""
        kept = kept_policy(self._run)
        adapter = kept.found(self._run)
        return self.named(kept.stage) if kept.is_first or adapter is None else self._of(adapter)


def collect(run: Run, engines: Engines) -> tuple[list[Candidate], Unused]:
    """Return the candidates that the recipe asks for, and the rows that cannot be compared."""
    kind = run.recipe.label.candidates
    if kind in ("file", "revision"):
        return from_files(run) if kind == "file" else from_revisions(run, engines)
    return from_policies(run, engines) if kind == "policies" else from_samples(run, engines)


def from_samples(run: Run, engines: Engines) -> tuple[list[Candidate], Unused]:
    """Pair the responses that the SFT policy samples to a prompt: all pairs, or so many, chosen by a hash."""
    settings = run.recipe.label
    prompts = run.select("train", settings.prompts_per_tag)
    policy = engines.policy()
    count, most = settings.samples_per_prompt, settings.max_pairs_per_prompt
    samples = [respond(run, NAME, policy, prompts, settings.sampling, sample=index) for index in range(count)]
    found: list[Candidate] = []
    unused: Unused = []
    for prompt, *texts in zip(prompts, *([chain.text for chain in chains] for chains in samples), strict=True):
        usable: list[tuple[int, int]] = []
        seen: set[frozenset[str]] = set()
        for i, j in itertools.combinations(range(count), 2):
            both = frozenset((texts[i], texts[j]))
            reason = unusable(texts[i], texts[j]) or ("the same two answers again" if both in seen else None)
            seen.add(both)
            if reason:
                unused.append({"id": prompt.id, "reason": reason, "texts": [texts[i], texts[j]]})
            else:
                usable.append((i, j))
        chosen = sorted(sorted(usable, key=lambda pair: run.seed(prompt.id, "pair", *pair))[:most])
        for i, j in chosen:
            name = prompt.id if count == 2 else f"{prompt.id}/{i}-{j}"
            found.append(of_prompt(run, prompt, texts[i], texts[j], name, {"samples": [i, j]}))
    return found, unused


def chains_to_label(run: Run, engines: Engines) -> list[tuple[Prompt, dict[str, Any]]]:
    """Return the chains of the stage `revise`; in a later round new ones, of what the newest policy answers.

    Who criticizes and revises is the same in all rounds, and so are the rules that set a revision aside.
    """
    if run.round == 1:
        return revised_chains(run)
    settings = run.recipe.revise
    prompts = run.select("train", run.recipe.label.prompts_per_tag)
    chains = respond(run, NAME, engines.policy(), prompts, run.recipe.label.sampling)
    revised = [chain for chain in chains if chain.prompt.tag in settings.revise_tags]
    revisers = revising_engines(run, engines.load, run.recipe.label.batch_size)
    for step in range(settings.rounds):
        critique_and_revise(run, NAME, revisers, revised, step)
    return [(chain.prompt, chain_row(chain, NO_ANSWER if chain.error else problem(run, chain))) for chain in chains]


def from_revisions(run: Run, engines: Engines) -> tuple[list[Candidate], Unused]:
    """Pair the last revision of each chain with the response that it revised."""
    found: list[Candidate] = []
    unused: Unused = []
    for prompt, row in chains_to_label(run, engines):
        if row.get("error"):
            if prompt.tag in run.recipe.revise.revise_tags:  # others have no revision to wait for
                unused.append(no_answer(prompt, f"revise: {row['error']}"))
        elif row["steps"]:
            texts = {"revision": row["steps"][-1]["revision"], "response": row["response"]}
            _pair_up(run, prompt, texts, found, unused)
    return found, unused


def from_policies(run: Run, engines: Engines) -> tuple[list[Candidate], Unused]:
    """Pair the responses of two policies to the same prompts."""
    settings = run.recipe.label
    prompts = run.select("train", settings.prompts_per_tag)
    written = {name: respond(run, NAME, engines.named(name), prompts, settings.sampling) for name in settings.policies}
    found: list[Candidate] = []
    unused: Unused = []
    for index, prompt in enumerate(prompts):
        _pair_up(run, prompt, {name: chains[index].text for name, chains in written.items()}, found, unused)
    return found, unused


def _pair_up(run: Run, prompt: Prompt, texts: dict[str, str], found: list[Candidate], unused: Unused) -> None:
    """Add the candidate of two named texts, in an order that a hash decides."""
    names = sorted(texts, key=lambda name: run.seed(prompt.id, "side", name))
    first, second = (texts[name] for name in names)
    reason = unusable(first, second)
    if reason:
        unused.append({"id": prompt.id, "reason": reason, "texts": [first, second]})
    else:
        found.append(of_prompt(run, prompt, first, second, prompt.id, {"first": names[0], "second": names[1]}))


def from_files(run: Run) -> tuple[list[Candidate], Unused]:
    """Read pairs with people's labels; the labels are kept apart, as the reference."""
    settings = run.recipe.label
    found: list[Candidate] = []
    unused: Unused = []
    seen: Counter[str] = Counter()
    known: dict[str, tuple[str, str]] = {}
    for path in run.loaded.candidate_files:
        imported = read_comparisons(path, tag=settings.candidate_tag, seed=run.recipe.seed)
        unused += [{"file": path.name, **row} for row in imported.unused]
        for row in imported.comparisons:
            seen[row.tag] += 1
            if settings.prompts_per_tag and seen[row.tag] > settings.prompts_per_tag.get(row.tag, 0):
                continue
            reason = why_unused(row, path.name, known)
            if reason:
                unused.append({"file": path.name, "reason": reason, "row": row.model_dump()})
                continue
            found.append(_of_comparison(run, row))
    return found, unused


def _of_comparison(run: Run, row: Comparison) -> Candidate:
    texts, preference = [text_of(row.chosen), text_of(row.rejected)], row.preference
    if run.seed(row.id, "side") % 2:
        texts, preference = texts[::-1], 1 - preference
    origin: dict[str, Any] = {key: row.provenance[key] for key in ("file", "line") if key in row.provenance}
    principles = principles_of(run, row.id, row.tag)
    prompt, text = with_system(row.prompt, run.recipe.system_prompt), as_text(row.prompt)
    about = (principles, row.tag, row.split, origin, preference, text)
    return Candidate(row.id, row.id, prompt, texts[0], texts[1], *about)


def of_prompt(
    run: Run,
    prompt: Prompt,
    first: str,
    second: str,
    name: str,
    origin: dict[str, Any] = {},  # noqa: B006
) -> Candidate:
    """Return two answers to a prompt as a candidate, under the principles that `label` asks about."""
    principles = principles_of(run, prompt.id, prompt.tag, prompt.category)
    about = (principles, prompt.tag, prompt.split, origin, None, prompt.prompt)
    return Candidate(name, prompt.id, prompt.messages, first, second, *about)


def principles_of(
    run: Run, prompt_id: str, tag: str, category: str = "", part: Constitution | None = None
) -> tuple[Principle, ...]:
    """Return the principles that a pair is judged by: the drawn one, or all that apply; of a part, where one is given.

    Raises:
        ConstitutionError: none applies.
    """
    constitution = part or run.constitution
    if run.recipe.label.principles == "one":
        return (draw(constitution, seed=run.recipe.seed, prompt_id=prompt_id, step=0, tag=tag, category=category),)
    return tuple(applying(constitution, tag, category))


def origin_of_round(run: Run) -> dict[str, Any]:
    """Return what a later round adds to the provenance of its rows: its number, and the policy whose answers it has."""
    if run.round == 1:
        return {}
    kept = kept_policy(run)
    return {"round": run.round, "policy": kept.stage, "policy_round": kept.round}


def no_answer(prompt: Prompt, error: str) -> dict[str, Any]:
    """Return the row of a prompt that an engine does not answer."""
    return {"id": prompt.id, "reason": NO_ANSWER, "error": error}


def unusable(better: str, worse: str) -> str | None:
    """Return why two answers cannot be compared, or None."""
    if not better.strip() or not worse.strip():
        return "empty"
    return "identical answers" if better.split() == worse.split() else None


def comparison(
    run: Run,
    prompt: Prompt | Candidate,
    answers: Sequence[str],
    preference: float,
    annotator: str,
    source: Source,
    votes: list[dict[str, Any]],
    principle: Principle | None,
    flags: list[str] = [],  # noqa: B006
) -> Comparison:
    """Return a labelled pair as a row that says where it came from; the first answer is the chosen one."""
    chosen, rejected = answers
    if isinstance(prompt, Candidate):
        turns, origin = prompt.prompt, {"prompt_id": prompt.prompt_id, **prompt.origin}
    else:
        turns, origin = prompt.messages, {"prompt_id": prompt.id}
    origin |= origin_of_round(run)
    return Comparison(
        id=f"{origin['prompt_id']}-{fingerprint([chosen, rejected])[:8]}",
        prompt=turns,
        chosen=assistant(chosen),
        rejected=assistant(rejected),
        preference=preference,
        source=source,
        annotator=annotator,
        tag=prompt.tag,
        split=prompt.split,
        votes=votes,
        flags=flags,
        provenance={
            **origin,
            "constitution": f"{run.constitution.name} {run.constitution.version}",
            "constitution_hash": run.constitution.hash_of("principles", "examples", "comparisons"),
            "principle": principle.id if principle else None,
            "principle_hash": principle.hash if principle else None,
            "model": run.recipe.model.model_name_or_path,
            "seed": run.recipe.seed,
        },
    )
