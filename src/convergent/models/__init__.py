"""Base models: where they come from, how their residual stream is reached, how they are spoken to."""
