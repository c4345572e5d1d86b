"""Searches with all readers, and prints how the inputs ended."""

import argparse
import sys
import time

from tests.fuzzing.search import READERS, search


def main() -> int:
    parser = argparse.ArgumentParser(description="Search for inputs that break a reader.")
    parser.add_argument("--inputs", type=int, default=20000, help="over all readers")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    total = 0
    for name in READERS:
        start = time.time()
        ends = search(name, round(arguments.inputs * READERS[name][2]), arguments.seed)
        total += sum(ends.values())
        print(
            f"{name} ({READERS[name][2]:.0%}): {sum(ends.values())} inputs in"
            f" {time.time() - start:.0f} s: "
            + ", ".join(f"{end} {count}" for end, count in ends.most_common()),
            flush=True,
        )
    print(f"{total} inputs, none of them broke a reader")
    return 0


if __name__ == "__main__":
    sys.exit(main())
