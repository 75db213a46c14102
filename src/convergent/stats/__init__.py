"""Statistics: the only place that computes an interval.

Every interval says how it was made and what it generalises over. Two kinds exist, because answers to one question are
alike: an interval over *answers* holds for more answers to these very questions; an interval over *questions* holds for
other questions of this kind, and with eight questions it is wide. Missing values (nan, None) are left out, never zero.
What cannot be said (no row, one question) has nan bounds. How to choose: docs/statistics.md; coverage by simulation: docs/coverage.md.

    values      Interval, quantiles, answers gathered by label
    rates       of hits: Wilson, exact, over questions, differences, reductions
    means       of scores and margins
    leaveout    of any statistic, over questions
    nulls       bands that random draws leave, and a value against one more draw
    turns       one turn in a sequence of scores, against shuffles
    twoway      over questions and training runs
    testing     permutation, Holm, equivalence, association
    change      when a curve changes its rate, or a path its direction
    correction  cheap scores put right by trusted ones
    ppi         what prediction-powered inference makes of both
    pooled      one odds ratio over organisms and questions
    power       how many questions and answers a difference needs
"""

from convergent.stats.change import ChangePoint, change_point, local_cosine
from convergent.stats.correction import (
    Corrected,
    CorrectedDifference,
    corrected_mean,
    corrected_mean_difference,
    corrected_rate,
    corrected_rate_difference,
)
from convergent.stats.leaveout import jackknife, jackknife_each, leave_one_out
from convergent.stats.means import (
    clustered_mean,
    iid_mean,
    paired_difference,
    question_differences,
    relative_reduction,
    unit_difference,
)
from convergent.stats.nulls import FEWEST_DRAWS, Band, against_band, beyond_draws, draws_difference, draws_mean, draws_mean_p, draws_p, null_band
from convergent.stats.pooled import Pooled, pooled_odds_ratio
from convergent.stats.power import (
    Clustering,
    Design,
    answers_needed,
    detectable,
    measured,
    power_table,
    smallest_design,
    underpowered,
)
from convergent.stats.ppi import tuned_weight
from convergent.stats.rates import (
    PRIOR_HITS,
    PRIOR_ICC,
    PRIOR_RUN_ICC,
    bootstrap_rate,
    clopper_pearson,
    clustered_rate,
    paired_rate_difference,
    rate,
    rate_difference,
    rate_reduction,
    wilson,
)
from convergent.stats.rates import clustered_bounds as _clustered_wilson
from convergent.stats.rates import wilson_bounds as _wilson
from convergent.stats.testing import (
    EXACT_FLIPS,
    ONE_SIDED,
    Association,
    Equivalence,
    all_of_them,
    association,
    equivalence,
    equivalence_of_rates,
    holm,
    one_sided_p,
    permutation_test,
    tost_p,
)
from convergent.stats.turns import Turn, find_turn, shortest_seen
from convergent.stats.twoway import two_way_difference, two_way_mean, two_way_rate
from convergent.stats.values import (
    LEVEL,
    OF_THIS_FILE,
    OVER_ANSWERS,
    OVER_BOTH,
    OVER_DRAWS,
    OVER_QUESTIONS,
    Interval,
    Labels,
    Values,
)

__all__ = [
    "EXACT_FLIPS", "FEWEST_DRAWS", "LEVEL", "OF_THIS_FILE", "ONE_SIDED", "OVER_ANSWERS", "OVER_BOTH", "OVER_DRAWS", "OVER_QUESTIONS", "PRIOR_HITS",
    "PRIOR_ICC", "PRIOR_RUN_ICC", "Association", "Band", "ChangePoint", "Clustering", "Corrected", "CorrectedDifference", "Design", "Equivalence",
    "Interval", "Labels", "Pooled", "Turn", "Values", "_clustered_wilson", "_wilson", "against_band", "all_of_them", "answers_needed", "association",
    "beyond_draws", "bootstrap_rate", "change_point", "clopper_pearson", "clustered_mean", "clustered_rate", "corrected_mean",
    "corrected_mean_difference", "corrected_rate", "corrected_rate_difference", "detectable", "draws_difference", "draws_mean", "draws_mean_p", "draws_p",
    "equivalence", "equivalence_of_rates", "find_turn", "holm", "iid_mean", "jackknife", "jackknife_each", "leave_one_out", "local_cosine", "measured",
    "null_band", "one_sided_p", "paired_difference", "paired_rate_difference", "permutation_test", "pooled_odds_ratio", "power_table", "question_differences",
    "rate", "rate_difference", "rate_reduction", "relative_reduction", "shortest_seen", "smallest_design", "tost_p", "tuned_weight",
    "two_way_difference", "two_way_mean", "two_way_rate", "underpowered", "unit_difference", "wilson",
]  # fmt: skip
