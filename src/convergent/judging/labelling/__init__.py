"""People as judges: `convergent label`.

    draw.py     which answers are asked, and in which order
    ledger.py   the table of what was answered, on disk after every answer
    screen.py   what the rater sees and types
"""
