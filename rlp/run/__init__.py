"""A run from start to end around its steps: checks, opening, what is saved, evaluations, telling,
ending."""
