"""What all figures share: style, tables, statistics."""
