"""From requests (condition x question x sample index) to responses."""
