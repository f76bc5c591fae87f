"""Log-probabilities of options of one and of several tokens."""

import math

import pytest
import torch
from tiny_roles import add_stirred, load

from rlaif.maths.agreement import expected_rating
from rlaif.model import options as options_module
from rlaif.model.options import option_logprobs

PROMPTS = [[1, 70, 71, 72], [1, 80]]
ONE, TWO, ZERO = 130, 140, 150


@pytest.fixture(scope="module")
def base(tiny_model):
    base = load(tiny_model)
    add_stirred(base, "policy", 1)
    return base


def after(base, ids):
    with torch.no_grad(), base.acting_as("policy"):
        return base.lm(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def test_options_of_one_token_are_read_off_one_forward_pass(base, one_thread):
    with base.acting_as("policy"):
        found = option_logprobs(base, PROMPTS, [[ONE], [TWO]])
    for row, prompt in zip(found, PROMPTS, strict=True):
        torch.testing.assert_close(row, after(base, prompt)[[ONE, TWO]], rtol=0, atol=1e-4)


def test_an_option_of_two_tokens_has_their_product_and_takes_it_off_the_one_that_it_begins_with(base, one_thread):
    with base.acting_as("policy"):
        found = option_logprobs(base, PROMPTS, [[ONE], [TWO], [ONE, ZERO]])
    for row, prompt in zip(found.tolist(), PROMPTS, strict=True):
        first, then = after(base, prompt), after(base, [*prompt, ONE])
        both = math.exp(first[ONE] + then[ZERO])
        expected = [math.exp(first[ONE]) - both, math.exp(first[TWO]), both]
        assert [math.exp(one) for one in row] == pytest.approx(expected, rel=1e-3)


def test_a_sure_ten_is_a_ten_although_it_begins_with_a_one(monkeypatch):
    """Of "1" with probability 0.9, a "0" follows nearly always; a rating that looked at "1" alone would be near 1."""

    def next_logprobs(base, prompts, tokens, rows):
        known = {1: 0.9, 2: 0.1, 0: 1.0}
        return torch.tensor([[math.log(known[token]) for token in tokens] for _ in prompts])

    monkeypatch.setattr(options_module.sampling, "next_logprobs", next_logprobs)
    one, two, ten = option_logprobs(None, [[5]], [[1], [2], [1, 0]])[0].tolist()
    assert (math.exp(ten), math.exp(two)) == pytest.approx((0.9, 0.1)) and one < -20
    never = [-1e9] * 7
    assert expected_rating([one, two, *never, ten])[0] == pytest.approx(0.1 * 2 + 0.9 * 10)
