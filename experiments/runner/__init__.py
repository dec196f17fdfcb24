"""The one runner: a config becomes points, every point becomes a row."""
