"""A study: a small YAML file, and the folder that running it fills."""
