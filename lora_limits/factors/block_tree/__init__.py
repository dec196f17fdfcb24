"""f by clusters of queries and keys, with a sampled remainder: real heads on long texts."""

from lora_limits.factors.block_tree.method import BlockTree

__all__ = ["BlockTree"]
