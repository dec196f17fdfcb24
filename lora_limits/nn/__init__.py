"""Attention and adapters inside Flax models."""
