"""Judges against each other, and against people: `convergent agree`.

    columns.py   which columns of a table are scores, and whose
    rows.py      which rows of two tables are the same answer
    measures.py  what two columns of scores have in common
    command.py   every pair of the files given, as a list and on the screen
"""
