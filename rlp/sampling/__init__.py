"""Thoughts from the policy, with noise that depends on its key alone."""
