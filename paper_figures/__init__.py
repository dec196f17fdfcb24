"""One module per figure, drawing from stored results only: NAME, CONFIG, optional ALSO, draw(rows,
...) -> Figure.
"""
