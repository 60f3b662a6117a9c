"""Axis analysis: which dims of which values are one axis, from a factor rule for each primitive."""

from jaxinfer.axes import rules_indexing, rules_linalg, rules_windows
from jaxinfer.axes.factors import Factors, factors_of, known_primitives

__all__ = ["Factors", "factors_of", "known_primitives"]

del rules_indexing, rules_linalg, rules_windows  # imported for the rules that they register
