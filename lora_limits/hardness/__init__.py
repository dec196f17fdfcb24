"""Hardness, executed: Theorem 4.1 as programs that answer hard problems from gradients alone.

gadgets      distances as attention scores, in the log domain
quadrature   F(1) - F(0) along a path of adapters, with certified error
deciders     the paper's path reduction, and the stronger readout of one entry
vectors      orthogonal_vectors, nearest_neighbours
sat          satisfiable, find_model: split and list
dimacs, command, oracle, instances      around them
"""

from lora_limits.hardness.deciders import (
    Decision,
    decide_by_path,
    decide_by_readout,
    path_problem,
    readout_problem,
)
from lora_limits.hardness.dimacs import Formula, parse
from lora_limits.hardness.gadgets import Gadget, hamming_gadget, inverse_noise, orthogonal_gadget
from lora_limits.hardness.oracle import gradient_oracle
from lora_limits.hardness.quadrature import (
    gauss_legendre,
    left_riemann,
    nodes_needed,
    path_integral,
)
from lora_limits.hardness.sat import Cost, find_model, satisfiable, satisfies
from lora_limits.hardness.vectors import nearest_neighbours, orthogonal_vectors

__all__ = [
    "Cost",
    "Decision",
    "Formula",
    "Gadget",
    "decide_by_path",
    "decide_by_readout",
    "find_model",
    "gauss_legendre",
    "gradient_oracle",
    "hamming_gadget",
    "inverse_noise",
    "left_riemann",
    "nearest_neighbours",
    "nodes_needed",
    "orthogonal_gadget",
    "orthogonal_vectors",
    "parse",
    "path_integral",
    "path_problem",
    "readout_problem",
    "satisfiable",
    "satisfies",
]
