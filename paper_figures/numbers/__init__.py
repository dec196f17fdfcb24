"""What figures and their tables read off the rows, where that is more than drawing: one module a
figure.
"""
