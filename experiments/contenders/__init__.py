"""What one would use instead, and how contenders are timed and judged together."""
