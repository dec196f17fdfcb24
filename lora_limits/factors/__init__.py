"""Ways to factor f, one file each; what they share is in method.py, factor.py and kernel.py.

A new one is a file with a frozen dataclass of FactorMethod and its `factor`, and a line in the list
below: its gradient, its estimate and `attention` follow.
"""

from lora_limits.factors.adapted import AdaptedMonomials
from lora_limits.factors.block_tree import BlockTree
from lora_limits.factors.method import FactorMethod
from lora_limits.factors.nystrom import Nystrom
from lora_limits.factors.random_features import RandomFeatures
from lora_limits.factors.skeleton import Skeleton
from lora_limits.factors.sparse import SparseLowRank
from lora_limits.factors.svd import Svd

__all__ = [
    "AdaptedMonomials",
    "BlockTree",
    "FactorMethod",
    "Nystrom",
    "RandomFeatures",
    "Skeleton",
    "SparseLowRank",
    "Svd",
]
