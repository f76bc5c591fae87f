"""What the label stage wrote of its labels, read and checked; and the numbers that all models of files share."""

from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field


class Part(BaseModel):
    """Base of all models of files: unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class Rate(Part):
    """`count` of `n`, with an interval; the numbers are None where n is 0."""

    n: int
    count: float | None = Field(None, validation_alias=AliasChoices("count", "correct"))
    rate: float | None
    low: float | None
    high: float | None


class Mean(Part):
    """A mean over `n` responses, with an interval."""

    n: int
    mean: float | None
    std: float | None = None
    low: float | None
    high: float | None


class JudgeTest(Part):
    """What the judge said about one test of the constitution."""

    prompt: str
    better: str
    worse: str
    strength: float | None
    bias: float | None
    correct: bool


class Mass(Part):
    """Probability that the judge's next token is one of the two options."""

    mean: float | None
    min: float | None


class Judge(Part):
    """The judge, measured on the constitution's tests."""

    model: str
    method: str
    tests: Rate
    same_position: Rate | None
    same_position_choice: Literal["first", "second"] | None = None
    mean_abs_bias: float | None
    median_abs_strength: float | None
    option_mass: Mass | None = None
    abstained: int = 0
    by_test: list[JudgeTest] = []
    judges: list["OneJudge"] = []


class OneJudge(Part):
    """One judge of several, on the constitution's tests."""

    name: str
    model: str
    method: str
    tests: Rate
    same_position: Rate | None
    abstained: int = 0


class Between(Rate):
    """How far two principles, or two judges, agree; kappa is None where both always said the same one thing."""

    between: list[str]
    kappa: float | None


class Agreement(Part):
    """How far several principles, or several judges, agree on the same pairs of answers."""

    pairs_of_answers: int
    alpha: float | None
    mean_kappa: float | None
    pairwise: list[Between]


class Votes(Part):
    """What the votes on the real pairs show of the labeller."""

    votes: int
    abstained: dict[str, int] = {}
    same_position: Rate | None = None
    same_position_choice: Literal["first", "second"] | None = None
    mean_abs_bias: float | None = None
    median_abs_strength: float | None = None
    option_mass: Mass | None = None
    principles: Agreement | None = None
    judges: Agreement | None = None


class SwapTest(Part):
    """Pairs asked again with their answers exchanged."""

    rows: int
    compared: int
    max_error: float | None


class Attacks(Part):
    """Attempts to steer the judge."""

    n: int
    flagged: int
    won: Rate
    won_unflagged: Rate
    without: Rate


class Reference(Rate):
    """Agreement with people, and of rules that need no model with them on the same pairs."""

    people_tied: int
    labeller_undecided: int
    rules: dict[str, Rate]


class Labels(Part):
    """The rows that the label stage made or took in; `contradictory` are those of people that oppose another."""

    method: str
    comparisons: int
    ratings: int = 0
    rankings: int = 0
    contradictory: int = 0
    ties: int
    unused: dict[str, int] = {}
    by_tag: dict[str, int] = {}
    chosen_longer: Rate | None
    chosen_refuses: dict[str, Rate] = {}
    mean_preference: float | None
    same_position: Rate | None = None
    same_position_choice: Literal["first", "second"] | None = None


class Safety(Part):
    """The safety order and the signs beside the preference; `tests` are the signs of the constitution's tests."""

    pairs: int
    orders: int
    same_order: Rate | None
    safe: int
    unsafe: int
    without_sign: dict[str, int] = {}
    against_signs: int
    without_principle: int
    tests: Rate | None


class Annotator(Part):
    """What the pairs that several annotators judged say of one of them."""

    annotator: str
    labels: int
    shared: int
    agreement: Rate | None
    skill: float
    weight: float
    finding: str
    stands_out: bool


class Annotators(Part):
    """What the pairs that several annotators judged say of all, the weakest first."""

    pairs: int
    shared: int
    known: int
    alpha: float | None
    annotators: list[Annotator]


class Quality(Part):
    """``quality.json`` of the label stage."""

    judge: Judge | None
    min_judge_accuracy: float | None = None
    judge_labels: bool
    swap_test: SwapTest | None = None
    gold: Rate | None = None
    attacks: Attacks | None = None
    votes: Votes | None = None
    flagged: dict[str, int] = {}
    reference: Reference | None = None
    safety: Safety | None = None
    annotators: Annotators | None = None
    labels: Labels
