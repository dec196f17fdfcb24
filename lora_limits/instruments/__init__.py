"""How things are measured: time, memory, operations, compilation, differences between gradients;
and what a command tells while it works.
"""
