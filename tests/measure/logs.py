"""A log of metrics, begun."""

from rlp.measure.metrics_log import MetricsLog
from rlp.process.lock import RunLock
from rlp.process.new_run_folder import create_run_folder
from rlp.process.run_folder import RunFolder
from tests.process.quiet_ranks import FakeRanks, make_config


def start_log(tmp_path, rank=0, **logging_settings):
    config = make_config(tmp_path / "run", **logging_settings)
    folder = (
        create_run_folder(config, FakeRanks(), RunLock(FakeRanks()))
        if rank == 0
        else RunFolder(tmp_path / "run")
    )
    return folder, MetricsLog(folder, config, FakeRanks(rank), total_hint=4)
