"""Modules: QLinear (deployed), FakeQuantLinear (training), and swap, which puts them into a model."""

from pyquant.nn.linear import FakeQuantLinear, QLinear
from pyquant.nn.swap import SwapReport, swap

__all__ = ["FakeQuantLinear", "QLinear", "SwapReport", "swap"]
