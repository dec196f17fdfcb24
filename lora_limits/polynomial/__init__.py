"""Polynomials for exp in many variables: series, monomials, evaluation, and the widths needed."""
