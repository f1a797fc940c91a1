"""How a weight becomes codes: ranges found once (:mod:`ranges`) or learned while training (:mod:`lsq`, :mod:`range_learning`,
:mod:`soft`, :mod:`ste`)."""

from pyquant.quantizers.base import QUANTIZERS, Quantizer, make_quantizer
from pyquant.quantizers.lsq import LSQ
from pyquant.quantizers.range_learning import RangeLearning
from pyquant.quantizers.ranges import RANGES, find_range
from pyquant.quantizers.soft import Soft
from pyquant.quantizers.ste import MinMaxSTE

__all__ = [
    "LSQ",
    "QUANTIZERS",
    "RANGES",
    "MinMaxSTE",
    "Quantizer",
    "RangeLearning",
    "Soft",
    "find_range",
    "make_quantizer",
]
