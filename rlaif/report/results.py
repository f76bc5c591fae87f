"""What the report reads of the evaluation: figures of policies, differences between them, and their answers."""

from rlaif.report.labels import Mean, Part, Rate


class PolicyMetrics(Part):
    """What the evaluation measured of one policy."""

    refusal: dict[str, Rate]
    score: dict[str, Mean] | None = None
    independent_score: dict[str, Mean] | None = None
    cost: dict[str, Mean] | None = None
    unsafe: dict[str, Rate] | None = None
    kl_to_reference: Mean | None = None
    response_tokens: Mean | None = None
    ended: Rate | None = None


class Difference(Part):
    """`policy` minus `against`, of rates as a fraction, of means in their unit; the interval is over prompts."""

    policy: str
    against: str
    metric: str
    tag: str
    n: int
    difference: float | None
    low: float | None
    high: float | None


class WinRate(Part):
    """How often the judge prefers the answer of `policy` to that of `against`."""

    policy: str
    against: str
    n: int
    wins: int
    ties: int
    losses: int
    rate: float | None
    low: float | None
    high: float | None
    same_position: Rate | None = None


class Answers(Part):
    """One prompt of the evaluation with the answers of all policies."""

    prompt: str
    tag: str = ""
    responses: dict[str, str]
    scores: dict[str, float | None] = {}
    refused: dict[str, bool] = {}


class Results(Part):
    """``results.json`` of the evaluate stage."""

    policies: list[str]
    reference: str | None = None
    prompts: dict[str, int] = {}
    metrics: dict[str, PolicyMetrics]
    differences: list[Difference] = []
    win_rates: list[WinRate] = []
    samples: list[Answers] = []
