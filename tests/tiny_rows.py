"""Made-up labels for the reward stage."""

from rlaif.records import Comparison, Ranking, Rating, assistant


def comparison(
    number, chosen="good good good", rejected="bad bad bad", *, tag="harmful", prompt=None, preference=1.0, **columns
):
    given = {"source": "construction", "annotator": "test", **columns}
    return Comparison(
        id=f"c-{number}",
        prompt=question(number, prompt),
        chosen=assistant(chosen),
        rejected=assistant(rejected),
        preference=preference,
        tag=tag,
        **given,
    )


def rating(number, response="good good", value=1.0, *, annotator="test", prompt=None, **columns):
    return Rating(
        id=f"r-{number}",
        prompt=question(number, prompt),
        response=assistant(response),
        rating=value,
        annotator=annotator,
        source="human",
        **columns,
    )


def ranking(number, responses, ranks=None, *, prompt=None, **columns):
    return Ranking(
        id=f"k-{number}",
        prompt=question(number, prompt),
        responses=[assistant(text) for text in responses],
        ranks=ranks or list(range(1, len(responses) + 1)),
        annotator="test",
        source="human",
        **columns,
    )


def question(number, prompt=None):
    return [{"role": "user", "content": prompt or f"Question {number}?"}]


# Twelve pairs that are easy to learn, half of them harmful.
ROWS = [
    comparison(number, "good " * (1 + number % 3), "bad " * (1 + number % 2), tag=("harmful", "ordinary")[number % 2])
    for number in range(12)
]
