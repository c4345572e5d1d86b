"""The tests, in rooms as the program is: `tests/data` for `rlp/data`, `tests/whole` for all of it.

A helper is imported by its whole name, `tests.training`; a fixture stands in a conftest.
"""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
