"""Inputs that nobody meant, for the readers of files that a stranger may have made.

    python -m tests.fuzzing --inputs 20000     a longer search than that of the test suite; prints
                                               how many inputs it tried

The claim is the same for each reader: a value, an error of our own, or a counted skip; never
another exception, never a change of the input.
"""
