"""Interventions at work: lowered to hooks (any condition per row), to weights, and their controls."""
