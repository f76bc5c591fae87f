"""Which properties of rows go with labels that a reference speaks against: literal numbers, oracles, identities."""

import math

import numpy as np
import oracles
import pytest
from scipy.stats import false_discovery_control, mannwhitneyu

from rlaif.maths.agreement import false_discovery_rates
from rlaif.maths.association import associations, auroc

EXACT = 1e-12


def test_a_property_of_the_lowest_margins_by_hand():
    """Ranks 1 and 2 of 5: their sum is 3, expected is 6 with the variance 2 * 3 * 6 / 12 = 3."""
    (found,) = associations([-2.0, -1.0, 1.0, 2.0, 3.0], {"low": [0, 1]})
    assert (found.name, found.rows, found.against, found.others_against) == ("low", 2, 1.0, 0.0)
    assert found.z == pytest.approx(3 / math.sqrt(3), abs=EXACT)
    assert found.p == found.q == pytest.approx(0.5 * math.erfc(found.z / math.sqrt(2)), abs=EXACT)
    assert found.log_odds == pytest.approx(math.log(2.5 / 0.5) - math.log(0.5 / 3.5), abs=EXACT)


def test_p_is_that_of_mann_and_whitney_with_ties():
    random = np.random.default_rng(0)
    margins = np.round(random.normal(size=80), 1)
    places = random.permutation(80)[:20]
    (found,) = associations(margins, {"some": places.tolist()})
    rest = np.delete(margins, places)
    wanted = mannwhitneyu(margins[places], rest, alternative="less", method="asymptotic", use_continuity=False)
    assert found.p == pytest.approx(wanted.pvalue, abs=1e-10)


def test_the_higher_margins_are_no_find_and_equal_ones_are_none():
    low, high = associations([-1.0, -1.0, 0.0, 2.0], {"high": [2, 3], "low": [0, 1]})
    assert (low.name, high.name) == ("low", "high")
    assert high.z == -low.z
    assert high.against == 0.25  # a margin of 0 speaks half against its label
    (same,) = associations([1.0] * 9, {"any": [1, 2]})
    assert (same.z, same.p) == (0.0, 0.5)


def test_the_scale_of_margins_does_not_matter():
    random = np.random.default_rng(1)
    margins = random.normal(size=40)
    having = {"a": list(range(12)), "b": list(range(5, 25))}
    assert associations(margins, having) == associations(7 * margins, having)


def test_false_discovery_rates_by_hand_and_as_scipy_has_them():
    assert false_discovery_rates([0.04, 0.01, 0.03, 0.9]) == pytest.approx([0.16 / 3, 0.04, 0.16 / 3, 0.9], abs=EXACT)
    p = np.random.default_rng(2).uniform(size=50) ** 2
    assert false_discovery_rates(p.tolist()) == pytest.approx(false_discovery_control(p).tolist(), abs=EXACT)
    assert false_discovery_rates([]) == []


def test_under_no_association_few_runs_find_anything():
    """At a false-discovery rate of 5 % a run without any association finds something in one of twenty."""
    random = np.random.default_rng(3)
    runs = 200
    finds = 0
    for _ in range(runs):
        margins = random.normal(size=200)
        having = {str(n): random.permutation(200)[: 10 + n % 60].tolist() for n in range(40)}
        finds += associations(margins, having)[0].q <= 0.05
    assert finds <= 20  # expected 10, deviation 3.1


def test_auroc_is_the_share_of_pairs_in_order():
    random = np.random.default_rng(4)
    scores, positive = np.round(random.normal(size=60), 1), random.uniform(size=60) < 0.3
    assert auroc(scores, positive) == pytest.approx(oracles.auroc(scores.tolist(), positive.tolist()), abs=EXACT)
    assert auroc([3.0, 1.0], [True, False]) == 1.0
    assert auroc([1.0, 1.0], [True, False]) == 0.5
    assert auroc([1.0, 2.0], [True, True]) is None


@pytest.mark.parametrize("having", [{"none": []}, {"all": [0, 1]}, {"beyond": [2]}, {"before": [-1]}])
def test_a_property_of_no_row_of_all_or_of_one_that_is_not_there_is_refused(having):
    with pytest.raises(ValueError, match=next(iter(having))):
        associations([1.0, 2.0], having)


@pytest.mark.parametrize("margins", [[], [math.nan, 1.0], [[1.0], [2.0]]])
def test_margins_that_are_no_row_of_finite_numbers_are_refused(margins):
    with pytest.raises(ValueError, match="finite"):
        associations(margins, {"a": [0]})
    with pytest.raises(ValueError, match="shape"):
        auroc([1.0], [True, False])
