"""The error of an approximate gradient, estimated from exact rows of sampled queries."""
