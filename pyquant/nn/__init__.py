"""Modules: QLinear (deployed), FakeQuantLinear (training), and swap, which puts them into a model."""

from pyquant.nn.linear import FakeQuantLinear, QLinear
from pyquant.nn.reuse import reuse_fake_quant
from pyquant.nn.swap import SwapReport, swap

__all__ = ["FakeQuantLinear", "QLinear", "SwapReport", "reuse_fake_quant", "swap"]
