"""Stage `reward`: LoRA adapters with fp32 heads on the shared base, trained on comparisons, rankings and ratings.

The loss is Bradley-Terry with soft labels and an optional margin (Bai et al. 2022, section 4; Llama-2, arXiv
2307.09288, section 3.2.2) or what the recipe names, plus a small penalty that keeps scores centred (Eisenstein et al.
2023, arXiv 2312.09244). The score is read at the last token of the answer. With `cost`, a second adapter learns how
harmful an answer is (Safe RLHF, arXiv 2310.12773), above 0 for unsafe. In later rounds the adapters of the round before
go on, with the round's labels and a share of earlier ones.

Writes ``adapter/`` (PEFT, sequence classification), ``metrics.jsonl`` and ``calibration.json``: what the model is
worth on held-out rows, and the shift and scale that `ppo` applies. Further adapters and the cost adapter stand in
folders of their own (``reward-2/``, ``cost/``). ``unused.jsonl`` holds the rows that nothing could be learned from,
``suspects.jsonl`` the labels that the model disbelieves, ``disagreements.jsonl`` the words of prompts, annotators and
sources that go with labels which the model, or a bag of words, speaks against.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlaif import files
from rlaif.errors import DataError
from rlaif.maths import agreement
from rlaif.model.roles import SharedBase
from rlaif.records import Comparison, Demonstration, Ranking, Rating, Row, read_rows
from rlaif.sections import Combination
from rlaif.stages import reward_audit as audit
from rlaif.stages import reward_calibration as worth
from rlaif.stages.cards import write_reward_card
from rlaif.stages.people import known_labels
from rlaif.stages.replay import known_sides, replayed
from rlaif.stages.reward_data import (
    NOTHING_KNOWN,
    Labelled,
    Split,
    Usable,
    cost_examples,
    count_reasons,
    examples,
    has_safety,
    refuse_unknown_names,
    split_rows,
    standard_ratings,
    usable,
    weighed_by_skill,
)
from rlaif.stages.reward_model import (
    CALIBRATION,
    COST,
    REWARD,
    RewardModel,
    Scale,
    encode_group,
    part_folder,
    read_calibration,
    roles_of,
)
from rlaif.stages.reward_pairs import pairs_among, refuse_too_few
from rlaif.stages.reward_training import Job, train
from rlaif.stages.run import Run

NAME = "reward"
_FILES: dict[str, type[Row]] = {"comparisons": Comparison, "rankings": Ranking, "ratings": Rating}
_MEAN = Combination()
_APART = 0.3  # of a head's norm: how far further members begin from the one they are copies of (docs/decisions.md)


def inputs(run: Run) -> dict[str, str]:
    """Return what this stage's result depends on."""
    label = run.stage_folder("label")
    names = {name: label / f"{name}.jsonl" for name in _FILES}
    rows = {name: path for name, path in names.items() if name == "comparisons" or path.is_file()}
    if run.recipe.reward.skill_weights and run.loaded.known:
        rows["known"] = run.loaded.known
    reference = {"demonstrations": _demonstrations(run)} if "revise" in run.recipe.stages else {}
    if run.round > 1:
        return run.inputs(
            run.recipe.reward,
            files={**rows, **reference, **_of_earlier_rounds(run)},
            replay=run.recipe.rounds.replay,
        )
    start = starting_adapter(run)
    own = {"sft" if run.recipe.reward.start_from == "sft" else "start": start} if start else {}
    return run.inputs(run.recipe.reward, files={**rows, **reference, **own})


def _of_earlier_rounds(run: Run) -> dict[str, Path]:
    """Return the adapters that training starts from, and the labels of all earlier rounds."""
    roles = [*roles_of(REWARD, run.recipe.reward.num_adapters), *([COST] if run.recipe.reward.cost else [])]
    rows = [
        (f"{name}.{before.round}", before.stage_folder("label") / f"{name}.jsonl")
        for before in run.earlier
        for name in _FILES
    ]
    starts = {f"start.{role}": start for role in roles if (start := starting_adapter(run, role))}
    return starts | {name: path for name, path in rows if path.is_file()}


def starting_adapter(run: Run, role: str = REWARD) -> Path | None:
    """Return the adapter that training starts from: SFT's (Ouyang et al. 2022, section 3.5), or that of the recipe.

    In a later round it is that of the same role from the round before, with its head.
    """
    if run.round > 1:
        return part_folder(run.earlier[-1].stage_folder(NAME), role) / "adapter"
    wanted = run.recipe.reward.start_from
    if wanted == "sft":
        return run.stage_folder("sft") / "adapter" if "sft" in run.recipe.stages else None
    return run.loaded.start


def _demonstrations(run: Run) -> Path:
    return run.stage_folder("revise") / "demonstrations.jsonl"


def reward(run: Run) -> dict[str, Any]:
    """Run the stage; return the counts for its manifest."""
    settings, folder = run.recipe.reward, run.stage_folder(NAME)
    rows, again, known = read_labels(run), [], NOTHING_KNOWN
    before = [read_labels(one) for one in run.earlier]
    if run.recipe.feedback == "ai" or run.round == run.recipe.rounds.count:  # people of later rounds may be new
        refuse_unknown_names(settings, itertools.chain(rows, *before))
    base = run.load_reward_base()
    if run.round > 1:
        earlier = [_usable(run, base, part).rows for part in before]
        again, known = replayed(run, earlier, rows), known_sides(earlier, settings.heldout_fraction)
    found = _usable(run, base, [*rows, *again])
    dev_fraction = settings.heldout_fraction if settings.early_stopping_patience else 0.0
    split = split_rows(found.rows, settings.heldout_fraction, dev_fraction=dev_fraction, known=known)
    if settings.skill_weights:
        split = weighed_by_skill(folder, [*rows, *itertools.chain(*before)], known_labels(run), split, found.unused)
    files.write_jsonl(folder / "unused.jsonl", found.unused)
    refuse_too_few(folder, len(rows) + len(again), found, split)
    of_safety = safety_rows(run, split) if settings.cost else None
    roles = roles_of(REWARD, settings.num_adapters)
    steps = [train_role(run, base, role, split) for role in roles][0]
    measured = measure(run, base, roles, split)
    counts = {
        "rows": len(rows),
        **({"replayed": len(again)} if run.round > 1 else {}),
        **{
            f"unused_{reason.replace(' ', '_')}": count
            for reason, count in count_reasons(found.unused).items()
            if count
        },
        "reversed": found.reversed,
        "train": len(split.train),
        **({"dev": len(split.dev)} if split.dev else {}),
        "heldout": len(split.heldout),
        "steps": steps,
        "heldout_accuracy": measured["heldout"]["all"]["rate"],
    }
    if run.round > 1:
        own = {row.id for row in rows}
        counts |= on_new_pairs(run, base, roles, [row for row in split.heldout if row.id in own])
    if of_safety:
        counts |= train_cost(run, base, of_safety)
    return counts


def on_new_pairs(run: Run, base: SharedBase, roles: list[str], rows: list[Labelled]) -> dict[str, Any]:
    """Return the share of this round's own held-out pairs that the last round's model and this one's have right.

    They are of the newest policy, which the last round's model has never seen answers of.
    """
    last = run.earlier[-1].stage_folder(NAME)
    earlier = [f"last-{role}" for role in roles]
    for name, role in zip(earlier, roles, strict=True):
        base.add_role(name, adapter=part_folder(last, role) / "adapter")
    counts: dict[str, Any] = {"new_pairs": 0, "new_pairs_right_before": None, "new_pairs_right": None}
    for key, names, folder in (("_before", earlier, last), ("", roles, run.stage_folder(NAME))):
        scales = [Scale(one["offset"], one["scale"]) for one in read_calibration(folder)["members"]]
        model = RewardModel(base, names, scales, _MEAN)
        scored = worth.score_rows(model, rows, run.recipe.reward.microbatch, run.progress, "scores of new pairs")
        pairs, gaps = worth.pairs_of(scored, model.combine)
        found = gaps[[place for place, pair in enumerate(pairs) if pair.preference > 0.5]]
        if len(found):
            share = agreement.win_rate(int((found > 0).sum()), int((found == 0).sum()), len(found)).rate
            counts |= {"new_pairs": len(found), f"new_pairs_right{key}": share}
    return counts


def read_labels(run: Run) -> list[Labelled]:
    """Read the comparisons, rankings and ratings that the stage `label` wrote."""
    rows: list[Labelled] = []
    for name, kind in _FILES.items():
        path = run.stage_folder("label") / f"{name}.jsonl"
        if name == "comparisons":
            run.output("label", path.name)
        if path.is_file() and path.stat().st_size:
            rows += read_rows(path, kind)  # type: ignore[arg-type]
    return rows


def _usable(run: Run, base: SharedBase, rows: list[Labelled]) -> Usable:
    return usable(base, rows, run.recipe.reward.max_length, run.recipe.reward.weights)


def train_role(run: Run, base: SharedBase, role: str, split: Split) -> int:
    """Train one adapter and its head, or load it where an interrupted run has finished it; return the steps taken."""
    settings = run.recipe.reward
    folder = part_folder(run.stage_folder(NAME), role)
    if (folder / "adapter").is_dir():  # of this very run: other inputs would have emptied the stage's folder
        base.add_role(role, adapter=folder / "adapter")
        return int(json.loads((folder / "trained.json").read_text(encoding="utf-8"))["steps"])
    seed = run.recipe.seed if role == REWARD else run.seed(NAME, role) % 2**32
    torch.manual_seed(seed)
    add_starting_role(run, base, role)
    rated = standard_ratings([*split.train, *split.dev, *split.heldout])
    learned, watched = (
        cost_examples(base, part, settings) if role == COST else examples(base, part, settings, rated)
        for part in (split.train, split.dev or split.heldout)
    )
    job = Job(role, folder, learned, watched, seed)
    steps = train(run, base, job, settings, starting_adapter(run, role))
    files.write_json(folder / "trained.json", {"steps": steps, "examples": len(job.train)})
    base.save_role(role, folder / "adapter")
    base.freeze(role)
    return steps


def add_starting_role(run: Run, base: SharedBase, role: str) -> None:
    """Add a role with the weights that training starts from.

    A reward keeps the head of the adapter or of the reward model that it starts from. A cost is something else, and
    gets a new head in the first round. In later rounds all go on as they were.
    """
    settings, start = run.recipe.reward, starting_adapter(run, role)
    if run.round > 1:
        run.earlier[-1].output(NAME, "adapter")
    elif start and settings.start_from == "sft":
        run.output("sft", "adapter")
    base.add_role(role, trainable=True, head=True, outputs=1 if role == COST else settings.num_heads, adapter=start)
    if run.round > 1:
        return
    weight = base.head_weight(role)
    with torch.no_grad():
        if role != COST and base.ready_head is not None and not weight.any():
            weight.copy_(base.ready_head.expand_as(weight))
        if role == COST or not weight.any():
            nn.init.normal_(weight, std=(base.hidden_size + 1) ** -0.5)  # Huang et al. 2024, detail 11
        else:
            _set_apart(weight, first=role == REWARD)


def _set_apart(weight: Tensor, first: bool) -> None:
    """Move members of an ensemble that start from one head apart, so that they can come to disagree.

    Args:
        weight: of the heads of one adapter, ``[K, hidden]``, changed in place.
        first: whether it is the first adapter's: its first head stays as it is, and so do heads that differ already.
    """
    if first and not torch.equal(weight, weight[:1].expand_as(weight)):
        return
    moved = weight[1:] if first else weight
    noise = torch.randn_like(moved)
    moved += _APART * moved.norm(dim=1, keepdim=True) * noise / noise.norm(dim=1, keepdim=True)


def measure(run: Run, base: SharedBase, roles: list[str], split: Split) -> dict[str, Any]:
    """Measure the reward model on held-out rows; write ``calibration.json`` and what speaks against labels."""
    settings, folder = run.recipe.reward, run.stage_folder(NAME)
    members = sum(len(base.head_weight(role)) for role in roles)
    model = RewardModel(base, roles, [Scale(0.0, 1.0)] * members, _MEAN)
    heldout = worth.score_rows(model, split.heldout, settings.microbatch, run.progress, "scores of held-out rows")
    scored = torch.cat(heldout.members)
    demonstrations = read_rows(_demonstrations(run), Demonstration) if run.has_output("revise") else []
    source, reference = worth.references(demonstrations)
    groups = [encode_group(model, prompt, [answer]) for prompt, answer in reference]
    sizes = range(0, len(groups), settings.microbatch)
    centre = torch.cat([model.members(groups[i : i + settings.microbatch]).cpu() for i in sizes]) if groups else scored
    model.scales = [
        Scale(centred.offset, spread.scale)
        for centred, spread in zip(worth.scales_of(centre), worth.scales_of(scored), strict=True)
    ]
    rows, gaps = worth.pairs_of(heldout, model.combine)
    seen = [pair.comparison for pair in pairs_among(split.train)]
    result = worth.describe_pairs(rows, gaps, seen)
    result |= {
        "min_heldout_accuracy": settings.min_heldout_accuracy,
        "train_pairs": len(seen),
        "train_rows": len(split.train),
        "offset": model.scale.offset,
        "scale": model.scale.scale,
        "members": [one._asdict() for one in model.scales],
        "reference": source,
        "length_correlation": worth.length_correlation(heldout, model.combine),
        "counterfactual": worth.counterfactual_gaps(model, split.heldout, model.scale.scale, settings.microbatch),
        "disagreements": None,
    }
    if settings.suspects:
        every = [*split.train, *split.dev]
        own = worth.score_rows(model, every, settings.microbatch, run.progress, "scores of train rows")
        both = worth.Scored(own.rows + heldout.rows, own.members + heldout.members)
        files.write_jsonl(folder / "suspects.jsonl", worth.suspects(both, settings.suspects))
        listed = audit.disagreements(both, model)
        listed = audit.try_words(listed, model, heldout, settings.microbatch)
        files.write_jsonl(folder / "disagreements.jsonl", listed)
        result["disagreements"] = [row for row in listed if row["found"]]
    files.write_json(folder / CALIBRATION, result)
    for role in roles:
        adapter = part_folder(folder, role) / "adapter"
        write_reward_card(run, base, adapter, len(base.head_weight(role)), result, split.train)
    return result


def safety_rows(run: Run, split: Split) -> Split:
    """Return the comparisons that speak of safety.

    Raises:
        DataError: there are none, or every answer has the same sign, from which no boundary can be learned.
    """
    folder = part_folder(run.stage_folder(NAME), COST)
    own = Split(*([row for row in part if isinstance(row, Comparison) and has_safety(row)] for part in split))
    told = [row for row in own.train if isinstance(row, Comparison)]
    signs = [safe for row in told for safe in (row.chosen_safe, row.rejected_safe) if safe is not None]
    if not own.heldout or len(set(signs)) < 2:
        raise DataError(
            f"{folder}: reward.cost needs comparisons with `safer`, `chosen_safe` or `rejected_safe`, answers of both "
            f"signs among them, and some held out; found {len(told)} to train on with {signs.count(True)} safe and "
            f"{signs.count(False)} unsafe answers, and {len(own.heldout)} held out. Set label.safety, or bring rows "
            "with these columns" + (", or raise rounds.replay." if run.round > 1 else ".")
        )
    return own


def train_cost(run: Run, base: SharedBase, own: Split) -> dict[str, Any]:
    """Train the cost adapter on the comparisons that speak of safety; return counts."""
    settings, folder = run.recipe.reward, part_folder(run.stage_folder(NAME), COST)
    steps = train_role(run, base, COST, own)
    model = RewardModel(base, [COST], [Scale(0.0, 1.0)], _MEAN)
    heldout = worth.score_rows(model, own.heldout, settings.microbatch, run.progress, "costs of held-out rows")
    costs = [model.combine(members) for members in heldout.members]
    rows = [row for row in heldout.rows if isinstance(row, Comparison)]
    scale = worth.scales_of(torch.cat(costs).unsqueeze(1))[0]
    result = worth.describe_costs(rows, costs)
    # Costs keep their zero, which is the boundary between safe and unsafe.
    result |= {"offset": 0.0, "scale": scale.scale, "members": [{"offset": 0.0, "scale": scale.scale}]}
    result |= {"train_rows": len(own.train)}
    files.write_json(folder / CALIBRATION, result)
    write_reward_card(run, base, folder / "adapter", 1, result, own.train)
    accuracy = result["sign"]["rate"] if result["sign"] else None
    return {"cost_train": len(own.train), "cost_steps": steps, "cost_sign_accuracy": accuracy}
