"""What PPO writes: metrics and samples while it goes on, its roles and what scores were measured in at its end."""

from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from rlaif import files, health
from rlaif.launch import leads
from rlaif.records import read_jsonl
from rlaif.stages.actors import REFERENCE, Actors, scale_of
from rlaif.stages.cards import write_policy_card
from rlaif.stages.checkpoints import POLICY, SAMPLES, STAGE
from rlaif.stages.composite import SCALE, part_scores
from rlaif.stages.run import Run
from rlaif.stages.training import METRICS

_SAMPLES_SHOWN = 4  # responses kept per update


def record(
    run: Run,
    actors: Actors,
    update: int,
    figures: dict[str, float],
    rows: list[Any],
    parts: dict[str, Tensor],
    own: list[bool],
) -> None:
    """Append the figures of an update and a few of its responses to the stage's files; `own`: the policy drew them."""
    if not leads():
        return
    folder = run.stage_folder(STAGE)
    files.append_jsonl(folder / METRICS, {"step": update + 1, "update": update + 1, **figures})
    if update % actors.settings.sample_every_updates:
        return
    for index, (prompt, response, value, divergence) in enumerate(rows[:_SAMPLES_SHOWN]):
        row = {
            "id": f"ppo-{update + 1}-{index}",
            "prompt_id": prompt.id,
            "seed": run.seed(STAGE, update, index),
            "step": update + 1,
            "update": update + 1,
            "prompt": prompt.prompt,
            "tag": prompt.tag,
            "response": response,
        }
        row |= {"score": value.item(), "kl": divergence.item()} | ({} if own[index] else {"drawn_by": REFERENCE})
        if actors.constraint:
            row["cost"] = actors.constraint.latest[index].item()
        files.append_jsonl(folder / SAMPLES, row | ({"parts": part_scores(parts, index)} if parts else {}))


def finish(run: Run, actors: Actors) -> dict[str, Any]:
    """Write the trained roles; return the counts for the manifest."""
    if not leads():
        return {}
    folder = run.stage_folder(STAGE)
    files.write_json(folder / SCALE, scale_of(actors))
    actors.base.save_role(POLICY, folder / "policy")
    for role in actors.learning[1:]:
        if actors.critic == "adapter":
            actors.base.save_role(role, folder / role)
        else:
            head = {"score.weight": actors.base.heads[role].state_dict()["weight"].cpu()}
            with files.fresh_folder(folder / role) as fresh:
                save_file(head, fresh / "value_head.safetensors")
    rows = [row for _, row in read_jsonl(folder / METRICS)]
    how = f" with {actors.settings.advantage_estimator} advantages" if actors.critic == "none" else ""
    kl = rows[-1]["rollout/kl_to_reference"]
    facts = [f"{len(rows)} updates of PPO{how}; KL to the reference {kl:.2f} nats a response."]
    counts: dict[str, Any] = {}
    if actors.constraint:
        first, last = rows[0]["rollout/cost"], rows[-1]["rollout/cost"]
        counts = {"first_cost": first, "last_cost": last, "last_lambda": rows[-1]["constraint/lambda"]}
        allowed = actors.constraint.multiplier.threshold
        facts.append(f"The mean cost of a response went from {first:.2f} to {last:.2f}; {allowed:g} was allowed.")
    write_policy_card(run, actors.base, folder / "policy", facts)
    warnings = {one.kind: one.update for one in health.findings(rows, actors.settings.health)}
    return counts | {
        "updates": len(rows),
        "responses": len(rows) * actors.settings.rollout_batch * actors.settings.samples_per_prompt,
        "critic": actors.critic,
        "first_score": rows[0]["rollout/score"],
        "last_score": rows[-1]["rollout/score"],
        "last_kl_to_reference": kl,
        **({"warnings": warnings} if warnings else {}),
    }
