"""Fine-tuning runs of the training experiments: tasks, texts, base models."""
