"""A pilot: a user's own model fine-tuned by exact and by approximate gradients, side by side."""
