"""`python -m paper_figures`.

finding   which figures there are, and where the rows of each lie
keeping   a folder's rows put among those that are kept here
main      the command line: figures drawn from rows, and what is missing said
"""
