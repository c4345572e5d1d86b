"""`rlp` and `python -m rlp`: the commands of `rlp.cli`, which take seconds to import."""

import sys

from rlp.process.command import run_command


def main() -> int:
    """Run one command; the exit code."""

    def command() -> int:
        from rlp.cli import main

        return main()

    if sys.argv[1:2] in (["train"], ["plan"]):  # a rank among others, which ends as one
        from rlp.train import start

        start(command)
    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
