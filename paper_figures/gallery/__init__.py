"""paper_figures/README.md, written from the configs and the kept rows: no number in it is typed.

notes       what a config says of itself: claim, command, minutes; what a manifest says of its run
saying      numbers as words
speed       lines of the results table: times, operations, memory
limits      lines about the boundary, the certificate and real heads
training    lines about fine-tuning
results     the table of all those lines
page        the page: figures, table, minutes
"""
