"""The sections of a recipe that several modules share: sampling, the cluster, the labeller, and the reward model.

`rlaif.recipe` puts all sections together and reads the file.
"""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rlaif.endpoints import BASE
from rlaif.records import Weight

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
HERE_TOLERANCE, SERVER_TOLERANCE = 0.01, 0.05
READS_OPTIONS = ("logprobs", "rating")  # methods of judges whose probabilities of options can be read
JudgeMethod = Literal["logprobs", "verdict", "rating", "function"]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class SamplingSection(Section):
    """How responses are drawn."""

    max_new_tokens: Positive = 64
    temperature: NonNegative = Field(0.7, description="0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class WarmSamplingSection(SamplingSection):
    """How responses are drawn where variety is wanted: at temperature 1."""

    temperature: NonNegative = Field(1.0, description="0 is greedy")


class RaySection(Section):
    """The cluster whose workers answer where a recipe names the engine `ray`."""

    address: str | None = Field(
        None, description="of a running cluster: `auto` or HOST:PORT; absent: one on this machine"
    )
    workers: Positive = Field(2, description="copies of the model at most, over all machines")
    cpus_per_worker: Positive = 1
    gpus_per_worker: Fraction = Field(0.0, description="0: a worker computes on the CPU; 0.5: two share a GPU")

    @field_validator("address")
    @classmethod
    def _can_be_asked(cls, address: str | None) -> str | None:
        if address is not None and address.startswith("ray://"):
            raise ValueError("Ray Data cannot be driven through a Ray client; run on a machine of the cluster: `auto`")
        if address is not None and address != "auto" and not re.fullmatch(r"[\w.-]+:[0-9]{1,5}", address):
            raise ValueError("`auto` or HOST:PORT is expected; leave it out for a cluster on this machine")
        return address

    @property
    def kind(self) -> str:
        """What a worker computes on."""
        return "cuda" if self.gpus_per_worker else "cpu"


class JudgeSection(Section):
    """One judge of several."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="stands in every vote")
    method: JudgeMethod = "logprobs"
    function: str | None = Field(None, description="a registered scoring function, for the method `function`")
    engine: str | None = Field(None, description="`base`, `ray` or a name in `engines`; absent: as label.judge")
    adapter: str | None = Field(None, description="judges with `sft`, or with an adapter folder, on the base model")
    few_shot: int | None = Field(None, ge=0, description="absent: as label.few_shot")
    weight: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _function_has_a_name(self) -> "JudgeSection":
        _check_function(self.method, self.function, "function")
        if bool(self.function) + bool(self.adapter) + bool(self.engine) > 1:
            raise ValueError("a judge is a function, an adapter on the base or an engine; give one of these keys")
        return self


class LabelSection(Section):
    """Where comparisons come from when `feedback` is `ai`."""

    method: Literal["judge", "revision", "contrast"] = "judge"
    judge: str = Field(BASE, description="who judges: `base`, `ray` or a name in `engines`")
    candidates: Literal["samples", "revision", "policies", "file"] = Field("samples", description="what is compared")
    samples_per_prompt: int = Field(2, ge=2, description="responses to a prompt, for `samples`")
    max_pairs_per_prompt: Positive | None = Field(None, description="pairs of a prompt's samples; absent: all")
    policies: list[str] = Field(["base", "sft"], description="two of `base`, `sft`, adapter folders")
    candidate_files: list[str] = Field([], description="pairs with people's labels, which no judge is shown")
    candidate_tag: str = Field("", description="tag of pairs from a file that bring none")
    sampling: WarmSamplingSection = WarmSamplingSection()
    prompts_per_tag: dict[str, Positive] = {}
    judge_method: JudgeMethod = "logprobs"
    judge_function: str | None = Field(None, description="a registered scoring function that compares")
    judges: list[JudgeSection] = Field([], description="several judges; absent: one, as judge_method says")
    principles: Literal["one", "all", "together"] = Field("one", description="drawn, each in turn, or in one request")
    few_shot: int = Field(2, ge=0, description="worked comparisons of the constitution shown to the judge")
    debias: Literal["logit", "probability"] = Field("logit", description="space in which both orders are averaged")
    verdict_clamp: Annotated[float, Field(gt=0.5, lt=1)] = Field(0.6, description="most that a verdict counts as")
    max_reasoning_tokens: Positive = Field(256, description="length of the reasoning before a verdict")
    min_option_mass: Fraction = Field(0.01, description="with less probability on the options: no answer")
    min_judge_accuracy: Fraction = Field(0.6, description="on the constitution's tests; below it `judge` stops")
    allow_weak_judge: bool = Field(False, description="go on below min_judge_accuracy")
    min_strength: NonNegative = Field(0.0, description="logits; weaker judgements are ties and are set aside")
    flagged: Literal["aside", "keep"] = Field("aside", description="pairs whose text tries to steer a judge")
    self_test_rows: int = Field(4, ge=0, description="pairs asked with their sides exchanged before all others")
    swap_tolerance: PositiveFloat | None = Field(None, description="how far p may be from 1-p after the exchange")
    gold_rate: Fraction = Field(0.05, description="pairs of known outcome planted, as a share of the real ones")
    attacks: int = Field(24, ge=0, description="steering attempts that the judge is tried with")
    reference: str | None = Field(None, description="a file of people's labels to compare the labels with")
    safety: bool = Field(False, description="judge helpfulness and harmlessness apart, and each answer for safety")
    helpful_tags: list[str] = Field(["helpful"], min_length=1, description="tags of principles for the preference")
    harmless_tags: list[str] = Field(["harmless"], min_length=1, description="tags of principles for safety")
    batch_size: Positive = 32

    @model_validator(mode="after")
    def _fits_together(self) -> "LabelSection":
        _check_function(self.judge_method, self.judge_function, "judge_function")
        names = [one.name for one in self.judges]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"judges: the name `{twice[0]}` stands twice; give each judge a name of its own")
        if len(set(self.policies)) != 2 or len(self.policies) != 2:
            raise ValueError(f"policies: {', '.join(self.policies) or 'none'}; two different ones are expected")
        if self.candidates == "file" and not self.candidate_files:
            raise ValueError("candidates is `file`, but candidate_files is empty; name the files that hold the pairs")
        if self.candidate_files and self.candidates != "file":
            raise ValueError(f"candidate_files is read where candidates is `file`, and it is `{self.candidates}`")
        self._safety_can_be_judged()
        return self

    def _safety_can_be_judged(self) -> None:
        if self.safety and self.method != "judge":
            raise ValueError(f"safety is judged by the method `judge`, and the method is `{self.method}`")
        if self.safety and not any(one.method in READS_OPTIONS for one in self.panel()):
            raise ValueError(
                "safety needs a judge of the method `logprobs` or `rating`: whether an answer is safe is read from the "
                "probabilities of two options"
            )

    def panel(self) -> list[JudgeSection]:
        """Return the judges: those listed, or the one that the simple keys describe."""
        return self.judges or [JudgeSection(name="judge", method=self.judge_method, function=self.judge_function)]

    def tolerance(self) -> float:
        """Return how far P may be from 1 - P; a server computes the same request in other company each time."""
        if self.swap_tolerance is not None:
            return self.swap_tolerance
        here = all(one.function or one.adapter or (one.engine or self.judge) == BASE for one in self.panel())
        return HERE_TOLERANCE if here else SERVER_TOLERANCE


class TrainingSection(Section):
    """Keys of `transformers.TrainingArguments` that a stage passes through."""

    num_train_epochs: PositiveFloat = 1.0
    max_steps: int = Field(-1, description="optimizer steps; -1 leaves it to num_train_epochs")
    per_device_train_batch_size: Positive = 8
    gradient_accumulation_steps: Positive = 1
    learning_rate: PositiveFloat = 2e-4
    lr_scheduler_type: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: NonNegative = 0.0
    max_grad_norm: PositiveFloat = 1.0
    max_length: Positive = Field(1024, description="tokens; longer rows are set aside with the reason")
    logging_steps: Positive = 1
    save_steps: Positive = Field(50, description="optimizer steps between checkpoints")
    report_to: list[str] | str = "none"


class PairLoss(Section):
    """How a comparison counts."""

    loss: Literal["bradley_terry", "noise_corrected"] = "bradley_terry"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="how far labels are moved towards 0.5, as a rate of wrong ones"
    )
    flip_rate: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="assumed rate of flipped labels, for `noise_corrected`"
    )

    @model_validator(mode="after")
    def _rate_fits(self) -> "PairLoss":
        if (self.loss == "noise_corrected") != (self.flip_rate > 0):
            raise ValueError(
                f"loss is `{self.loss}` and flip_rate {self.flip_rate:g}; `noise_corrected` needs a rate above 0, and "
                "no other loss reads one"
            )
        return self


class Combination(Section):
    """How the members of a reward model, heads and adapters, become one score."""

    ensemble: Literal["mean", "worst", "uncertainty"] = Field(
        "mean", description="mean, least, or mean less uncertainty_coef times the variance of the members"
    )
    uncertainty_coef: Annotated[float, Field(allow_inf_nan=False)] = Field(
        0.5, description="for `uncertainty`, per deviation of the scores: above 0 a penalty, below 0 a bonus"
    )


class RewardSection(TrainingSection):
    """The reward model: LoRA adapters and fp32 heads on the shared base."""

    start_from: str = Field("sft", min_length=1, description="`sft`, `base` or an adapter folder to start with")
    model: str | None = Field(None, min_length=1, description="somebody's reward model, as a base of its own")
    model_revision: str | None = Field(None, description="commit of this model on the Hub")
    pair_loss: PairLoss = PairLoss()
    pair_losses: dict[str, PairLoss] = Field({}, description="other losses, by annotator or source")
    ranking_loss: Literal["pairs", "plackett_luce"] = Field("pairs", description="rankings with ties take `pairs`")
    rating_coef: NonNegative = Field(1.0, description="what the squared error of a rating counts")
    weights: dict[str, Weight] = Field({}, description="what rows count, by annotator or source; absent: 1")
    skill_weights: bool = Field(False, description="weigh train rows by their annotators' skill on shared pairs")
    center_rewards_coefficient: NonNegative = 0.01
    num_heads: Positive = Field(1, description="outputs of the head, each trained on a bootstrap of the rows")
    num_adapters: Positive = Field(1, description="adapters trained from different seeds, as an ensemble")
    cost: bool = Field(False, description="train a cost adapter too, on rows that speak of safety")
    heldout_fraction: Fraction = Field(0.2, description="share of prompts kept for evaluation, drawn per tag")
    eval_steps: Positive | None = Field(None, description="steps between measurements on the way; absent: none")
    early_stopping_patience: Positive | None = Field(
        None, description="measurements without a better loss, on a share of the train rows, after which to stop"
    )
    min_heldout_accuracy: Fraction = Field(0.6, description="for every tag, and the cost; below it no `ppo`")
    allow_weak_reward: bool = Field(False, description="let `ppo` start below min_heldout_accuracy")
    suspects: int = Field(50, ge=0, description="labels listed that the model disbelieves most; 0: not looked for")
    microbatch: Positive = Field(8, description="rows per forward pass when scoring")

    @property
    def members(self) -> int:
        """How many scores the reward model gives of one response."""
        return self.num_adapters * self.num_heads

    @model_validator(mode="after")
    def _watched(self) -> "RewardSection":
        if self.early_stopping_patience and self.eval_steps is None:
            raise ValueError("early_stopping_patience needs eval_steps: how often to measure")
        if self.model and self.start_from == "sft":
            raise ValueError("start_from is `sft`, whose adapter does not fit reward.model; give `base` or an adapter")
        if self.model_revision and not self.model:
            raise ValueError("model_revision is that of reward.model, and there is none")
        return self


class EvaluateSection(Section):
    """The base and all policies on prompts never trained on."""

    sampling: SamplingSection = SamplingSection()
    prompts_per_tag: dict[str, Positive] = {}
    judge: str | None = Field(None, description="who judges: `base`, `ray` or a name in `engines`; absent: as `label`")
    judge_method: Literal["logprobs", "verdict", "rating"] = Field("logprobs", description="how `judge` is asked")
    judge_prompts_per_tag: int = Field(8, ge=0, description="prompts of each tag that the judge compares; 0: no judge")
    batch_size: Positive = 32

    @model_validator(mode="after")
    def _method_has_a_judge(self) -> "EvaluateSection":
        if self.judge is None and self.judge_method != "logprobs":
            raise ValueError(
                "judge_method says how evaluate.judge is asked, and no judge is named; without one the judges of "
                "`label` compare, as that section says"
            )
        return self

    def panel(self, label: LabelSection) -> list[JudgeSection]:
        """Return the judges: the one named here, or those of the stage `label`."""
        own = self.judge and JudgeSection(name="judge", method=self.judge_method, engine=self.judge)
        return [own] if own else label.panel()


class HumanSection(Section):
    """Where comparisons come from when `feedback` is `human` or `mixed`."""

    files: list[str] = []
    known: str | None = Field(None, description="a file of labels taken for the truth, to measure annotators with")
    annotator: str = "human"
    tag: str = Field("", description="tag of rows that bring none")


def _check_function(method: str, function: str | None, key: str) -> None:
    if method == "function" and not function:
        raise ValueError(f"the method `function` needs the name of a registered function; give `{key}`")
    if function and method != "function":
        raise ValueError(f"{key} is used by the method `function`, and the method is `{method}`")
