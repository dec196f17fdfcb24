"""What the training experiments share: tasks, texts, base models, what is watched along a run."""
