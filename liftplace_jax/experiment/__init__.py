"""From a config to its stages: what is wired, in one place (`context`), and done, in functions."""
