import itertools
import math

import pytest
import torch
from scipy.stats import chisquare
from tiny_roles import PROMPTS, RESPONSES, add_stirred, load

from rlaif.errors import ModelError
from rlaif.model import drawing, sampling, slots
from rlaif.model.roles import BASE

pytestmark = pytest.mark.usefixtures("one_thread")

# Sums of fp32 products in another order (other widths of a batch, a prefix computed apart), in nats.
ROUNDING = 1e-4
PREFIX = [1, *range(50, 74)]
MIXED = [[1, 70, 71, 72, 73, 74, 75], [1, 80], [5], [1, 90, 91, 92]]
SHARING = [PREFIX + tail for tail in ([9], [30, 31, 32, 33], [30, 31, 40], [200, 201])]
SETS = {"mixed lengths": MIXED, "a common beginning": SHARING, "the same prompt": [PREFIX] * 3, "one prompt": [PREFIX]}


IN_BOTH = pytest.mark.parametrize("base", ["fp32", "nf4"], indirect=True)


@pytest.fixture(scope="module")
def base(request, tiny_model, tiny_model_64):
    """A base with two roles, in fp32 where a test does not ask for 4 bits."""
    four_bit = getattr(request, "param", "fp32") == "nf4"
    base = load(tiny_model_64 if four_bit else tiny_model, load_in_4bit=four_bit)
    add_stirred(base, "policy", 1)
    add_stirred(base, "reward", 2, head=True)
    return base


def sample(base, prompts, *, role="policy", length=9, seeds=None, **keys):
    with base.acting_as(role):
        return sampling.sample(base, prompts, max_new_tokens=length, seeds=seeds or range(len(prompts)), **keys)


@pytest.fixture
def ends_early(base, monkeypatch):
    """Make a token end responses that greedy ones contain, at different places or not at all."""
    greedy = sample(base, MIXED + SHARING, temperature=0)
    monkeypatch.setattr(base.tokenizer, "eos_ids", [2, greedy[0].ids[4], greedy[1].ids[2], greedy[4].ids[6]])
    return base


def assert_same(found, expected):
    assert [(s.ids, s.ended) for s in found] == [(s.ids, s.ended) for s in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=ROUNDING)


def logits_after(base, ids, role="policy"):
    """A plain forward pass of the whole model over one row without padding: the logits after its last token."""
    with torch.no_grad(), base.acting_as(role):
        return base.lm(input_ids=torch.tensor([ids])).logits[0, -1]


# --- what is generated ---------------------------------------------------------------------------------------------


@IN_BOTH
@pytest.mark.parametrize("prompts", SETS.values(), ids=SETS.keys())
def test_greedy_responses_are_those_of_transformers(ends_early, prompts):
    base = ends_early
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    eos = base.tokenizer.eos_ids
    with torch.no_grad(), base.acting_as("policy"):
        whole = base.lm.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=eos, pad_token_id=0
        )
    for response, expected in zip(sample(base, prompts, temperature=0), whole[:, width:].tolist(), strict=True):
        end = next((index for index, token in enumerate(expected) if token in eos), 8)
        assert response.ids == expected[: end + 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_stop_sampling_with_role_token_and_response(base, temperature, monkeypatch):
    project, calls = base.logits, []

    def broken(hidden):
        calls.append(0)
        logits = project(hidden)
        return logits.fill_(torch.nan) if len(calls) == 3 else logits

    monkeypatch.setattr(base, "logits", broken)
    with pytest.raises(ModelError, match="role `policy`: the probabilities of token 3 of response 1 are no numbers"):
        sample(base, [[1, 70, 71]], temperature=temperature, seeds=[3])


def test_greedy_takes_the_most_probable_token_whatever_the_seed(base):
    (response,) = sample(base, [PREFIX], length=4, temperature=0)
    for step, token in enumerate(response.ids):
        assert logits_after(base, PREFIX + response.ids[:step]).argmax() == token
    assert_same(sample(base, [PREFIX], length=4, temperature=0, seeds=[99]), [response])


def test_the_acting_role_is_the_one_that_answers(base):
    policy, plain = (sample(base, MIXED, role=role, temperature=0) for role in ("policy", BASE))
    assert [s.ids for s in policy] != [s.ids for s in plain]


def test_an_end_token_ends_a_response_and_is_part_of_it(ends_early):
    responses = sample(ends_early, MIXED + SHARING, temperature=0)
    stops = set(ends_early.tokenizer.eos_ids)
    assert {s.ended for s in responses} == {True, False}
    assert len({len(s.ids) for s in responses}) >= 3
    for response in responses:
        assert not stops & set(response.ids[:-1])
        assert response.ended == (response.ids[-1] in stops)
        assert response.ended or len(response.ids) == 9
        assert len(response.logprobs) == len(response.ids)


def test_a_response_that_ends_at_the_last_step_has_ended(ends_early):
    first = sample(ends_early, MIXED, temperature=0)[0]
    assert first.ended
    assert sample(ends_early, MIXED, temperature=0, length=len(first.ids))[0] == first
    cut = sample(ends_early, MIXED, temperature=0, length=len(first.ids) - 1)[0]
    assert (cut.ids, cut.ended) == (first.ids[:-1], False)


@pytest.fixture
def rows_per_step(base):
    """Record the shape of each batch of token ids that goes into the model."""
    shapes = []
    embedding = base.lm.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, arguments: shapes.append(tuple(arguments[0].shape)))
    yield shapes
    hook.remove()


def test_ended_rows_are_computed_no_longer_and_nothing_is_padded(ends_early, rows_per_step):
    responses = sample(ends_early, MIXED, temperature=0)
    lengths = [len(s.ids) - s.ended for s in responses]
    expected = [(1, sum(map(len, MIXED)))] + [(1, sum(length > step for length in lengths)) for step in range(8)]
    assert rows_per_step == [shape for shape in expected if shape[1]]


def test_a_prompt_comes_in_as_soon_as_a_row_has_ended(ends_early, rows_per_step):
    prompts = [[1, 90, 91, 92], [1, 80], [5]]
    assert [len(s.ids) for s in sample(ends_early, prompts, temperature=0)] == [5, 3, 9]
    rows_per_step.clear()
    sample(ends_early, prompts, temperature=0, rows=2)
    # The third prompt comes in at the fourth pass, and is alone after the fifth.
    assert rows_per_step == [(1, n) for n in [6, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1]]


def test_what_a_prompt_shares_with_an_earlier_one_is_computed_once(base, rows_per_step):
    sample(base, SHARING, length=1)
    # The longest comes first; of the others, all but what each has in common with it and at least the last token.
    assert rows_per_step == [(1, 29), (1, 1 + 1 + 2)]
    rows_per_step.clear()
    sample(base, [row[20:] for row in SHARING], length=1)  # five tokens in common: too few
    assert rows_per_step == [(1, 9 + 8 + 7 + 6)]


def test_the_tokens_of_one_pass_are_bounded(base, rows_per_step, monkeypatch):
    monkeypatch.setattr(slots, "TOKENS_PER_SLOT", 2)
    sample(base, MIXED, length=1)
    # Eight tokens may come in besides the last one of each prompt: six of the first, and with three more too many.
    assert rows_per_step == [(1, 7), (1, 4 + 2 + 1)]


# --- what must change nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "prompts", "keys"),
    [
        ("fp32", MIXED, {"temperature": 0.7, "top_p": 0.9}),
        ("fp32", SHARING, {"temperature": 0.7, "top_p": 0.9}),
        ("fp32", SHARING, {"temperature": 0}),
        ("nf4", MIXED, {"temperature": 0.7, "top_p": 0.9}),
    ],
    ids=["mixed lengths", "a common beginning", "greedy", "mixed lengths in 4 bits"],
    indirect=["base"],
)
def test_batch_composition_order_and_padding_change_no_token(ends_early, prompts, keys):
    base = ends_early
    seeds = [11, 12, 13, 14]
    together = sample(base, prompts, seeds=seeds, **keys)
    alone = [sample(base, [row], seeds=[seed], **keys)[0] for row, seed in zip(prompts, seeds, strict=True)]
    assert_same(together, alone)
    backwards = sample(base, prompts[::-1], seeds=seeds[::-1], **keys)
    assert_same(backwards[::-1], alone)
    beside_a_long_one = sample(base, [*prompts, [1, *range(3, 60)]], seeds=[*seeds, 15], **keys)
    assert_same(beside_a_long_one[:4], alone)
    for rows in (1, 2, 3):
        assert_same(sample(base, prompts, seeds=seeds, rows=rows, **keys), alone)


@pytest.mark.parametrize(("base", "rows"), [("fp32", 2), ("fp32", 7), ("nf4", 3)], indirect=["base"])
def test_slots_and_padded_batches_give_the_same_responses(ends_early, monkeypatch, rows):
    base, prompts = ends_early, [*MIXED, *SHARING, *SHARING, *MIXED]
    assert base.packs
    responses = sample(base, prompts, temperature=0.8, rows=rows)
    assert len({len(s.ids) for s in responses}) >= 2
    with base.acting_as("policy"):
        options = sampling.next_logprobs(base, prompts, [7, 130], rows)
    monkeypatch.setattr(base, "packs", False)
    assert_same(sample(base, prompts, temperature=0.8, rows=rows), responses)
    with base.acting_as("policy"):
        torch.testing.assert_close(
            sampling.next_logprobs(base, prompts, [7, 130], rows), options, rtol=0, atol=ROUNDING
        )


def test_the_longest_common_prefix_is_found_among_some_prompts():
    prompts = [[1, 2, 3], [1, 2, 4, 5], [9], [1, 2, 3, 7], [1], [1, 2, 3], [1, 2, 4, 6]]
    common = [[3, 2, 0, 3, 1, 3, 2], [2, 4, 0, 2, 1, 2, 3]]  # of the first two with each
    prefixes = slots.Prefixes(prompts)
    assert sorted(prefixes.place.values()) == list(range(7))
    for row, shared in enumerate(common):
        for size in range(5):
            for others in itertools.combinations(range(7), size):
                count, place = prefixes.longest(prefixes.place[row], sorted(prefixes.place[other] for other in others))
                assert count == max((shared[other] for other in others), default=0)
                assert count == 0 or count == next(shared[o] for o in others if prefixes.place[o] == place)


@IN_BOTH
def test_sharing_a_prefix_changes_no_token(base, monkeypatch):
    shared = sample(base, SHARING, temperature=0.8)
    monkeypatch.setattr(slots, "MIN_SHARED_PREFIX", 10_000)
    assert_same(sample(base, SHARING, temperature=0.8), shared)
    monkeypatch.setattr(slots, "MIN_SHARED_PREFIX", 1)
    assert_same(sample(base, SHARING, temperature=0.8), shared)


def test_a_longer_limit_continues_the_same_response(base):
    short, long = (sample(base, MIXED, length=length, seeds=[5, 6, 7, 8]) for length in (5, 40))
    assert [s.ids for s in short] == [s.ids[:5] for s in long]


def test_seeds_decide_and_may_be_any_integer(base):
    seeds = [0, 1, 2**63 + 7, 2**64 + 7, -3, 7]
    responses = sample(base, [PREFIX] * 6, seeds=seeds)
    assert_same(sample(base, [PREFIX] * 6, seeds=seeds), responses)
    assert len({tuple(s.ids) for s in responses}) == 4  # 2**63 + 7, 2**64 + 7 and 7 are the same seed


def columns(batch, left, right):
    """The same batch with further columns of padding; the ids there are real tokens, which must not matter."""

    def wider(tensor, value):
        return torch.nn.functional.pad(tensor, (left, right), value=value)

    mask = wider(batch.mask, 0)
    return sampling.Batch(
        wider(batch.ids, 77),
        mask,
        (mask.cumsum(1) - 1).clamp_min(0),
        torch.nn.functional.pad(batch.response_ids, (0, right), value=77),
        torch.nn.functional.pad(batch.response_mask, (0, right), value=False),
    )


@IN_BOTH
@pytest.mark.parametrize(("left", "right"), [(0, 0), (5, 0), (0, 7), (9, 3)])
def test_padding_changes_no_score_and_no_logprob(base, left, right):
    wide = columns(sampling.pack(base, PROMPTS, RESPONSES), left, right)
    with torch.no_grad(), base.acting_as("reward"):
        scores = sampling.scores(base, "reward", wide)
        logits = sampling.response_logits(base, wide, sampling.hidden_states(base, wide))
        logprobs = sampling.token_logprobs(logits, wide.response_ids)
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            alone = sampling.pack(base, [prompt], [response])
            hidden = sampling.hidden_states(base, alone)
            assert scores[row].item() == pytest.approx(base.head("reward", hidden[0, -1]).item(), abs=ROUNDING)
            plain = base.lm(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            expected = [plain[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)]
            assert logprobs[row, : len(response)].tolist() == pytest.approx(expected, abs=ROUNDING)
    assert scores.abs().min() > 0.01


# --- probabilities -------------------------------------------------------------------------------------------------


@IN_BOTH
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prompts", [MIXED, SHARING], ids=["mixed lengths", "a common beginning"])
def test_logprobs_of_a_sample_are_the_teacher_forced_ones(ends_early, prompts, temperature):
    base = ends_early
    responses = sample(base, prompts, temperature=temperature, top_p=0.8)
    batch = sampling.pack(base, prompts, [s.ids for s in responses])
    with torch.no_grad(), base.acting_as("policy"):
        logits = sampling.response_logits(base, batch, sampling.hidden_states(base, batch), temperature)
        logprobs = sampling.token_logprobs(logits, batch.response_ids)
    for row, response in enumerate(responses):
        assert logprobs[row, : len(response.ids)].tolist() == pytest.approx(response.logprobs, abs=ROUNDING)
    token = responses[0].ids[0]
    expected = (logits_after(base, prompts[0]) / (temperature or 1)).log_softmax(-1)[token].item()
    assert responses[0].logprobs[0] == pytest.approx(expected, abs=ROUNDING)


def nucleus(probabilities, top_p):
    """The tokens of Holtzman et al. 2020, one at a time."""
    chosen, total = [], 0.0
    for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
        if total >= top_p:
            break
        chosen.append(token)
        total += probabilities[token]
    return chosen


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (1.5, 0.9)])
def test_tokens_are_drawn_as_often_as_their_probabilities_say(tiny_model, temperature, top_p):
    base = load(tiny_model)
    draws = 2000
    responses = sample(base, [PREFIX] * draws, role=BASE, length=1, temperature=temperature, top_p=top_p)
    counts = torch.bincount(torch.tensor([s.ids[0] for s in responses]), minlength=259).tolist()
    probabilities = (logits_after(base, PREFIX, BASE) / temperature).double().softmax(-1).tolist()
    allowed = nucleus(probabilities, top_p)
    assert len(allowed) > 1 and (len(allowed) < 259) == (top_p < 1)
    assert sum(counts[token] for token in allowed) == draws
    total = sum(probabilities[token] for token in allowed)
    expected = {token: draws * probabilities[token] / total for token in allowed}
    common = [token for token in allowed if expected[token] >= 5]
    rare = set(allowed) - set(common)
    found = [counts[token] for token in common] + [sum(counts[token] for token in rare)] * bool(rare)
    wanted = [expected[token] for token in common] + [sum(expected[token] for token in rare)] * bool(rare)
    assert len(common) > 3
    assert chisquare(found, wanted).pvalue > 0.001


def test_second_tokens_are_drawn_apart_from_first_ones():
    uniforms = torch.stack([drawing.uniforms(seed, 2) for seed in range(3000)])
    assert uniforms.min() >= 0 and uniforms.max() < 1
    assert torch.corrcoef(uniforms.T)[0, 1].abs() < 3 / math.sqrt(3000)
    assert chisquare(torch.histc(uniforms[:, 1], bins=20, min=0, max=1).tolist()).pvalue > 0.001


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.5, {1}), (0.51, {1, 3}), (0.75, {1, 3}), (0.76, {1, 3, 0}), (0.999, {0, 1, 2, 3})]
)
def test_a_nucleus_is_the_smallest_set_that_holds_enough(top_p, kept):
    probabilities = torch.tensor([[0.1875, 0.5, 0.0625, 0.25]], dtype=torch.float64)
    found = drawing._nucleus(probabilities, torch.tensor([top_p], dtype=torch.float64))[0]
    assert {index for index, value in enumerate(found.tolist()) if value} == kept
    assert all(found[index] == probabilities[0, index] for index in kept)


def test_a_draw_inverts_the_cumulative_distribution_over_a_large_vocabulary():
    logits = 3 * torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    logits[:, ::3] = -math.inf
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn, logprobs = drawing.draw(logits, uniform, 0.7, 1.0)
    exact = (logits.double() / 0.7).softmax(-1)
    for row, token in enumerate(drawn.tolist()):
        below = exact[row, :token].sum()
        assert below - 1e-6 <= uniform[row] < below + exact[row, token] + 1e-6
    torch.testing.assert_close(logprobs.double(), exact.log()[torch.arange(50), drawn], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.49, 1), (0.51, 3), (0.74, 3), (1 - 2**-53, 4)])
def test_a_token_without_probability_is_never_drawn(uniform, token):
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 1 - math.log(2), 1 - math.log(2), -math.inf]])
    drawn, logprob = drawing.draw(logits, torch.tensor([uniform], dtype=torch.float64), 1.0, 1.0)
    assert drawn.tolist() == [token]
    assert logprob.item() == pytest.approx({1: math.log(1 / 2), 3: math.log(1 / 4), 4: math.log(1 / 4)}[token])


def test_a_tiny_nucleus_is_greedy(base):
    greedy = sample(base, MIXED, temperature=0)
    found = sample(base, MIXED, temperature=1, top_p=1e-6)
    assert [s.ids for s in found] == [s.ids for s in greedy]


@IN_BOTH
@pytest.mark.parametrize("prompts", SETS.values(), ids=SETS.keys())
def test_next_logprobs_are_those_of_a_plain_forward_pass(base, prompts):
    options = [130, 7, 7, 201]
    with base.acting_as("policy"):
        found = sampling.next_logprobs(base, prompts, options)
    assert found.dtype == torch.float32 and found.shape == (len(prompts), 4)
    for row, prompt in zip(found, prompts, strict=True):
        expected = logits_after(base, prompt).log_softmax(-1)[options]
        torch.testing.assert_close(row, expected, rtol=0, atol=ROUNDING)


def test_next_logprobs_of_all_tokens_sum_to_one(base):
    with base.acting_as("policy"):
        mass = sampling.next_logprobs(base, MIXED, range(259)).exp().sum(1)
    torch.testing.assert_close(mass, torch.ones(4))


# --- packing -------------------------------------------------------------------------------------------------------


def test_prompts_are_padded_on_the_left_and_responses_on_the_right(base):
    batch = sampling.pack(base, [[1, 7, 8], [1]], [[20], [21, 22]])
    assert batch.ids.tolist() == [[1, 7, 8, 20, 0], [0, 0, 1, 21, 22]]
    assert batch.mask.tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 3], [0, 0, 0, 1, 2]]
    assert batch.response_ids.tolist() == [[20, 0], [21, 22]]
    assert batch.response_mask.tolist() == [[True, False], [True, True]]
    hidden = torch.arange(10.0).reshape(2, 5, 1)
    assert sampling.last_hidden(batch, hidden).tolist() == [[3.0], [9.0]]


def test_batches_hold_similar_lengths_longest_first():
    assert sampling.batches_by_length([3, 9, 5, 9, 1], 2) == [[1, 3], [2, 0], [4]]
    assert sampling.batches_by_length([4, 4, 4], 5) == [[0, 1, 2]]
    assert sampling.batches_by_length([], 3) == []
