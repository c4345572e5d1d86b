"""From a command line to a trainer to an exit code.

    rlp train CONFIG [section.key=value ...]
    deepspeed --module rlp.train CONFIG [section.key=value ...]
    torchrun --nproc_per_node 2 -m rlp.train CONFIG [section.key=value ...]

are the same program as `train.py`.
"""

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from rlp.process.launcher import LauncherGone, launchers, watch_from_the_start

if TYPE_CHECKING:
    from rlp.process.ranks import Ranks


def start(program: Callable[[], int] | None = None) -> NoReturn:
    """Run the program of this process, and end the process with its exit code.

    Args:
        program: by default `main`, with the arguments of the process.
    """
    watch_from_the_start()  # what is imported after this line takes seconds
    from rlp.process.command import run_as_process

    run_as_process(program or main)


def main(arguments: list[str] | None = None, *, name: str | None = None) -> int:
    """Parse the command line, run, and turn errors into one clear message and an exit code.

    Args:
        name: of the program in its messages; by default that of the process.
    """
    options = parse(arguments, name)

    def work(start_ranks: Callable[[float], "Ranks"]) -> int:
        from rlp.config import load_config
        from rlp.process.console import visible_text
        from rlp.process.exit_codes import DONE
        from rlp.process.ranks import stop_ranks
        from rlp.trainer import Trainer

        config = load_config(options.config, options.overrides)
        trainer = Trainer(config, ranks=start_ranks(config.run.watchdog_s))
        if options.dry_run:
            print(visible_text(trainer.plan(options.machine, options.mean_thought_tokens)))
            return DONE
        code = trainer.fit().code
        stop_ranks()
        return code

    return run_program(work)


def run_program(work: Callable[[Callable[[float], "Ranks"]], int]) -> int:
    """Do what trains, and turn errors into one clear message and an exit code.

    Args:
        work: is given what starts the ranks, with the seconds of their watchdog; returns an exit
            code.
    """
    from rlp.config import ConfigError
    from rlp.data.sources import DataError
    from rlp.learn.checkpoint import CheckpointError
    from rlp.learn.guard import NumericsError
    from rlp.process import exit_codes
    from rlp.process.console import visible_text
    from rlp.process.files import FolderLostError, NotWrittenError
    from rlp.process.json_files import DamagedFileError
    from rlp.process.outside import PartError
    from rlp.process.ranks import PeerLost, start_ranks

    ranks = None

    def fail(error: Exception, code: int, *, everywhere: bool = False) -> int:
        """Say an error once, on the first rank, or on every rank."""
        if everywhere or ranks is None or ranks.is_first:
            print(visible_text(f"error: {error}"), file=sys.stderr)
        return code

    def start(watchdog_s: float) -> "Ranks":
        nonlocal ranks
        ranks = start_ranks(watchdog_s)
        return ranks

    try:
        launchers().require()
        return work(start)
    except PartError as error:  # what a part does may differ from rank to rank
        return fail(error, exit_codes.BAD_CONFIG, everywhere=True)
    except (ConfigError, CheckpointError) as error:
        return fail(error, exit_codes.BAD_CONFIG)
    except (DataError, DamagedFileError) as error:
        return fail(error, exit_codes.BAD_DATA)
    except NotWrittenError as error:
        return fail(error, exit_codes.NOT_WRITTEN)
    except FolderLostError as error:
        return fail(error, exit_codes.FOLDER_LOST)
    except NumericsError as error:
        return fail(error, exit_codes.BAD_NUMERICS)
    except (PeerLost, LauncherGone) as error:
        return fail(error, exit_codes.PEER_LOST, everywhere=True)


def parse(arguments: list[str] | None, name: str | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=name,
        description="Pretrain a causal language model with RLP.",
        epilog="Overrides: section.key=value, as in thought.group_size=8.",
    )
    add_options(parser)
    options = parser.parse_intermixed_args(arguments)
    planning = {
        "--machine": options.machine,
        "--mean-thought-tokens": options.mean_thought_tokens,
    }
    for name, value in planning.items():
        if value and not options.dry_run:
            parser.error(
                f"{name} {value} is for a plan, and without --dry-run this would start a real run"
                f" on this machine. Write --dry-run {name} {value}, or leave {name} out."
            )
    return options


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a run is started with."""
    parser.add_argument("config", help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the resolved config, one example, memory, FLOPs, seconds and disk, and exit",
    )
    parser.add_argument(
        "--machine",
        default="",
        metavar="8xH100",
        help=(
            "with --dry-run: plan for 8 H100 (also A100, H200), or with 8x80 for the memory of 8"
            " devices of 80 GB, instead of this machine"
        ),
    )
    parser.add_argument(
        "--mean-thought-tokens",
        type=float,
        metavar="N",
        help=(
            "with --dry-run: plan seconds for thoughts of N tokens in the mean, instead of every"
            " thought at its budget"
        ),
    )
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher")


if __name__ == "__main__":
    start()
