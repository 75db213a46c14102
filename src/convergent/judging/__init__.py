"""From (question, answer, rubric) to a score 0-100 or a reason for its absence."""
