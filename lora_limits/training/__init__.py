"""Fine-tuning of adapters by any method: batches, the training loop, checkpoints of its runs."""
