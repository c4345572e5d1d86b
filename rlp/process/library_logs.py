"""What libraries say goes to the logs of a run, and not between its lines."""

import logging
from contextlib import suppress
from pathlib import Path

from rlp.config import ConfigError
from rlp.process.files import FolderLostError, open_log
from rlp.process.ranks import Ranks
from rlp.process.run_folder import RunFolder

_LIBRARIES = ("transformers", "datasets", "torch", "py.warnings", "DeepSpeed", "vllm")


class _OnlyTo(logging.Filter):
    """Hands a logger's records to one handler and to nobody else."""

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__()
        self.handler = handler

    def filter(self, record: logging.LogRecord) -> bool:
        self.handler.handle(record)
        return False


class RankLog(logging.Handler):
    """Adds what libraries say to a file. Where that can not be done it is lost: a run does not end
    for its libraries' words."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ConfigError, FolderLostError), open_log(self._path) as file:
            file.write(self.format(record) + "\n")


def quiet_libraries(folder: RunFolder, ranks: Ranks) -> None:
    """Send what libraries log, and Python's warnings, to `logs/rank_N.log`, and take their progress
    bars away.

    A library gives its logger a console handler when it is imported, so this goes after the
    imports. DeepSpeed may come later: it is imported by the engine, and logs while it is.
    """
    import transformers.utils.logging as transformers_logging

    handler = RankLog(folder.logs / f"rank_{ranks.rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for library in _LIBRARIES:
        # Torch gives some of its inner loggers handlers of their own.
        for name in list(logging.root.manager.loggerDict):
            if name.startswith(f"{library}."):
                logging.getLogger(name).handlers = []
                logging.getLogger(name).propagate = True

        logger = logging.getLogger(library)
        logger.handlers = [handler]
        logger.propagate = False

    # DeepSpeed logs through one logger, whose filter outlives the handler that its import adds.
    logging.getLogger("DeepSpeed").filters = [_OnlyTo(handler)]
    logging.captureWarnings(True)
    transformers_logging.disable_progress_bar()
