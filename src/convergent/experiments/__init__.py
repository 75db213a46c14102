"""Experiments, one module each: what is sampled under which interventions, and which claims the answers decide."""
