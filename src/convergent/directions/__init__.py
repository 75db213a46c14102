"""From judged responses to a `Direction`: classes, streaming means, and what to make of the result."""
