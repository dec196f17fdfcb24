"""How things are measured: time, memory, operations, compilation, differences between gradients."""
