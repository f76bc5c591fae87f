"""The recipe's section `ppo`: the settings of the optimization, and which of them go together."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlaif.endpoints import BASE, RAY
from rlaif.health import HealthSection
from rlaif.reward_parts import OWN_STAGE, CompositeSection, IndependentPart
from rlaif.sections import Combination, Fraction, NonNegative, Positive, PositiveFloat, Section, WarmSamplingSection

_GROUPS = ("rloo", "grpo", "dr_grpo")  # estimators that compare responses to one prompt
_ONLY_GAE = {"gamma", "lam", "cliprange_value", "vf_coef", "critic", "whiten_rewards"}


class ConstraintSection(Section):
    """A limit to what responses cost on average, kept by a multiplier (PPO-Lagrangian)."""

    cost: str | None = Field(None, min_length=1, description="`reward`: of this run's stage, else a `4-reward` folder")
    function: str | None = Field(None, min_length=1, description="a registered function; higher costs more")
    threshold: Annotated[float, Field(allow_inf_nan=False)] = Field(0.0, description="highest mean cost of a response")
    lambda_init: NonNegative = Field(1.0, description="score that a unit of cost is worth at first; 0 stays 0")
    lambda_lr: NonNegative = Field(0.1, description="learning rate of log lambda; 0: lambda stays as it is")
    lambda_max: PositiveFloat = 5.0
    lambda_update_delay_steps: int = Field(0, ge=0, description="updates that leave lambda at lambda_init")
    episode_cost_window_size: Positive = Field(128, description="latest responses whose mean cost moves lambda")

    @model_validator(mode="after")
    def _fits(self) -> "ConstraintSection":
        if bool(self.cost) == bool(self.function):
            given = "both are given" if self.cost else "none is given"
            raise ValueError(f"a constraint has one source, cost (an adapter) or function; {given}")
        if self.lambda_init > self.lambda_max:
            raise ValueError(f"lambda_init {self.lambda_init:g} is above lambda_max {self.lambda_max:g}")
        return self


class PpoSection(CompositeSection):
    """Proximal policy optimization, and its relatives without a critic."""

    sampling: WarmSamplingSection = WarmSamplingSection()
    sampling_engine: str = Field(BASE, description="who samples: `base`, or a name in `engines` whose servers are vLLM")
    importance_cap: PositiveFloat | None = Field(
        2.0, description="most that a token of a server counts, as policy over sampler; null: tokens count alike"
    )
    max_logprob_gap: PositiveFloat | None = Field(
        1.0, description="nats per token, mean; a server further away has another model; null: not looked at"
    )
    prompts_per_tag: dict[str, Positive] = {}
    updates: Positive = Field(50, description="iterations of sample, score, optimize")
    rollout_batch: Positive = Field(16, description="prompts per iteration")
    samples_per_prompt: Positive = 1
    sampling_batch: Positive | None = Field(None, description="responses sampled at a time; absent: all of an update's")
    minibatch: Positive = Field(16, description="responses per optimizer step")
    microbatch: Positive = Field(8, description="responses per forward and backward pass")
    num_ppo_epochs: Positive = 4
    target_kl: PositiveFloat | None = Field(
        None, description="nats per token to the policy that sampled; an epoch that ends above it is an update's last"
    )
    advantage_estimator: Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce"] = Field(
        "gae", description="gae needs a critic; the others compare whole responses and have none"
    )
    loss_aggregation: Literal["auto", "token", "sequence", "constant"] = Field(
        "auto", description="mean over tokens, over each response's tokens, or sums over max_new_tokens"
    )
    learning_rate: PositiveFloat = 1e-4
    lr_scheduler_type: Literal["constant", "linear"] = "constant"
    warmup_updates: int = Field(0, ge=0, description="updates over which the learning rate rises to its height")
    adam_epsilon: PositiveFloat = 1e-5
    max_grad_norm: PositiveFloat = 1.0
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    cliprange: PositiveFloat = 0.2
    cliprange_value: PositiveFloat = 0.2
    vf_coef: NonNegative = 0.1
    entropy_coef: NonNegative = 0.0
    final_entropy_coef: NonNegative | None = Field(
        None, description="entropy_coef goes linearly to it, which the last update has"
    )
    final_temperature: PositiveFloat | None = Field(None, description="sampling.temperature goes to it likewise")
    reference_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="probability that the reference draws a response in place of the policy"
    )
    kl_coef: NonNegative = 0.05
    kl_in: Literal["auto", "reward", "loss"] = Field("auto", description="k1 in the reward, or k3 in the loss")
    kl_target: PositiveFloat | None = Field(None, description="nats per response; adapts kl_coef")
    whiten_rewards: bool = False
    missing_eos_penalty: NonNegative = Field(0.0, description="taken off the score of a response without an end")
    score_clip: PositiveFloat | None = None
    critic: Literal["auto", "trunk", "adapter"] = Field("auto", description="auto: trunk on a CPU, adapter on a GPU")
    reward_function: str | None = Field(None, description="a registered scoring function instead of the reward model")
    judge: str | None = Field(
        None, description="who rates where the judge does: `base`, `ray` or a name in `engines`; absent: as label.judge"
    )
    reward_model: Combination = Combination()
    independent: list[IndependentPart] = Field(
        [], description="parts of a score that the policy does not optimize, as in `rewards`; absent: none"
    )
    constraint: ConstraintSection | None = Field(None, description="a limit to the cost of responses (PPO-Lagrangian)")
    ptx_coef: NonNegative = Field(0.0, description="weight of the loss on plain text (PPO-ptx); 0: it is not learned")
    ptx_file: str | None = Field(None, min_length=1, description="plain text, or JSON lines with the column `text`")
    ptx_length: Annotated[int, Field(gt=1)] = Field(256, description="tokens in a chunk of the text")
    ptx_batch: Positive = Field(8, description="chunks per optimizer step")
    ptx_heldout: int = Field(8, ge=0, description="chunks that are not learned; their loss is logged in each update")
    health: HealthSection = HealthSection()
    save_every_updates: Positive = 1
    sample_every_updates: Positive = 1

    @model_validator(mode="after")
    def _divides(self) -> "PpoSection":
        if self.sampling.temperature == 0 or self.sampling.top_p < 1:
            raise ValueError(
                "sampling: PPO needs a temperature above 0 and top_p 1: its ratios are of the distribution sampled from"
            )
        responses = self.rollout_batch * self.samples_per_prompt
        if responses % self.minibatch or self.minibatch % min(self.microbatch, self.minibatch):
            raise ValueError(
                f"rollout_batch x samples_per_prompt = {responses} must be a multiple of minibatch = {self.minibatch}, "
                f"and that a multiple of microbatch = {self.microbatch}"
            )
        if self.warmup_updates > self.updates:
            raise ValueError(f"warmup_updates is {self.warmup_updates}, and there are {self.updates} updates in all")
        if self.kl_target and not self.kl_coef:
            raise ValueError("kl_target multiplies kl_coef, which is 0; give a kl_coef above 0 to start from")
        if self.reward_function and self.rewards:
            raise ValueError("reward_function and rewards exclude each other; make the function a part of rewards")
        return self

    @model_validator(mode="after")
    def _server_samples(self) -> "PpoSection":
        if self.sampling_engine == RAY:
            raise ValueError("sampling_engine is `ray`, whose workers load no adapters; name a server in `engines`")
        unread = sorted({"importance_cap", "max_logprob_gap"} & self.changed)
        if self.sampling_engine == BASE and unread:
            raise ValueError(f"{unread[0]} is read where a server samples; name one in sampling_engine")
        return self

    @model_validator(mode="after")
    def _estimator_fits(self) -> "PpoSection":
        estimator = self.advantage_estimator
        unread = sorted(_ONLY_GAE & self.changed)
        if not self.has_critic and unread:
            raise ValueError(f"{unread[0]} is read where advantage_estimator is `gae`, and it is `{estimator}`")
        if estimator in _GROUPS and self.samples_per_prompt < 2:
            raise ValueError(
                f"advantage_estimator `{estimator}` compares responses to one prompt, and samples_per_prompt is "
                f"{self.samples_per_prompt}; at least 2 are expected"
            )
        if estimator == "reinforce" and self.rollout_batch * self.samples_per_prompt < 2:
            raise ValueError(
                "advantage_estimator `reinforce` compares responses; rollout_batch of at least 2 is expected"
            )
        if self.ptx_coef and not self.ptx_file:
            raise ValueError("ptx_coef is above 0, but ptx_file names no text to learn from")
        of_text = sorted({"ptx_batch", "ptx_heldout", "ptx_length"} & self.changed)
        if of_text and not self.ptx_file:
            raise ValueError(f"{of_text[0]} is read where there is a text, and ptx_file names none")
        return self

    @model_validator(mode="after")
    def _independent_is(self) -> "PpoSection":
        """Refuse an independent score from what the reward is made of."""
        if len({part.name for part in self.independent}) < len(self.independent):
            raise ValueError("independent: two parts have one name; give each its own")
        optimized = [(part.source, part.function) for part in self.rewards]
        if not self.rewards:
            own = self.reward_function
            optimized = [("judge", None) if own == "judge" else ("function", own) if own else ("model", None)]
        for part in self.independent:
            if (part.source, part.function) in optimized:
                raise ValueError(
                    f"independent: the part `{part.name}` ({part.function or part.source}) is what the policy "
                    "optimizes; name a function, judge, cost or member of the reward model that is not in the reward"
                )
        sources = [part.source for part in self.independent if part.source != "function"]
        if len(set(sources)) < len(sources):
            raise ValueError("independent: one source stands in two parts; each but `function` can be given once")
        if any(part.member for part in self.independent) and ("model", None) not in optimized:
            raise ValueError("independent: `member` is one of the reward model that is optimized; here give `model`")
        return self

    @property
    def is_judged(self) -> bool:
        """Whether the judge's rating is the reward, a part of it, or a part of the independent score."""
        return self.reward_function == "judge" or any(part.judge for part in [*self.rewards, *self.independent])

    @model_validator(mode="after")
    def _judge_is_asked(self) -> "PpoSection":
        if self.judge and not self.is_judged:
            raise ValueError("judge is read where the judge's rating is a score, and none is; see reward_function")
        return self

    @model_validator(mode="after")
    def _schedules_have_an_end(self) -> "PpoSection":
        scheduled = sorted({"final_entropy_coef", "final_temperature"} & self.changed)
        if scheduled and self.updates == 1:
            raise ValueError(f"{scheduled[0]} is what the last of several updates has, and updates is 1")
        return self

    def temperature_at(self, update: int) -> float:
        """Return what divides the logits of policy and reference in an update, counted from 0."""
        return self._on_the_way(self.sampling.temperature, self.final_temperature, update)

    def entropy_coef_at(self, update: int) -> float:
        """Return the weight of the entropy bonus in an update, counted from 0."""
        return self._on_the_way(self.entropy_coef, self.final_entropy_coef, update)

    def _on_the_way(self, first: float, last: float | None, update: int) -> float:
        return first if last is None else first + (last - first) * update / (self.updates - 1)

    @model_validator(mode="after")
    def _constraint_fits(self) -> "PpoSection":
        if self.constraint and self.whiten_rewards:
            raise ValueError(
                "whiten_rewards gives rewards another unit in each update, and constraint compares them with costs; "
                "leave one of them out"
            )
        if self.constraint and self.constraint.cost and any(part.cost for part in [*self.rewards, *self.independent]):
            raise ValueError("the cost is a part of rewards or independent, and constraint limits it; leave one out")
        return self

    @property
    def costs(self) -> dict[str, str]:
        """Where cost adapters come from, by the key that names them."""
        named = [("ppo.rewards", part.cost) for part in self.rewards]
        named += [("ppo.independent", part.cost) for part in self.independent]
        named += [("ppo.constraint", self.constraint.cost)] if self.constraint else []
        return {key: cost for key, cost in named if cost}

    def with_costs_of(self, stage: Path) -> "PpoSection":
        """Return the section with the folder of another run's cost adapter as it was found, for any working folder."""
        place = {"cost": str(stage)}
        found: dict[str, Any] = {
            key: [part.model_copy(update=place) if _is_elsewhere(part.cost) else part for part in getattr(self, key)]
            for key in ("rewards", "independent")
        }
        if self.constraint and _is_elsewhere(self.constraint.cost):
            found["constraint"] = self.constraint.model_copy(update=place)
        return self.model_copy(update=found)

    @property
    def has_critic(self) -> bool:
        """Whether a critic takes part."""
        return self.advantage_estimator == "gae"

    @property
    def kl_place(self) -> Literal["reward", "loss"]:
        """Where the KL to the reference is priced: GRPO and its correction have it in the loss, the others not."""
        if self.kl_in == "auto":
            return "loss" if self.advantage_estimator in ("grpo", "dr_grpo") else "reward"
        return self.kl_in

    @property
    def aggregation(self) -> Literal["token", "sequence", "constant"]:
        """How terms of tokens become the policy's loss: as the estimator's authors do it, unless the recipe says."""
        if self.loss_aggregation != "auto":
            return self.loss_aggregation
        if self.advantage_estimator in ("gae", "grpo"):
            return "token" if self.has_critic else "sequence"
        return "constant"


def _is_elsewhere(cost: str | None) -> bool:
    return cost not in (None, OWN_STAGE)
