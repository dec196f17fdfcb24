"""One module per figure, drawing from stored results only. The module holds

CONFIG    the config whose rows it draws;
draw      rows -> Figure; (rows, {config: rows}) -> Figure where there is ALSO;
ALSO      (optional) names of other configs whose rows it is given, empty where there are none;
table     (optional) rows -> Markdown, written beside the figure;
COMMAND   (optional) what makes its results, where that is not the config's own command.
"""
