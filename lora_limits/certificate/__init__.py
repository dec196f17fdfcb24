"""Certified bounds on the polynomial gradients' errors: the theorem (bound), its parts, and the
rounding beneath them.
"""
