"""How a program ends, as a number for the job that started it."""

DONE = 0
BAD_CONFIG = 2
"""A config, a checkpoint or a part from outside that can not be used; nothing was made."""
BAD_DATA = 3
"""Data, or a file of a run, that can not be read."""
BAD_NUMERICS = 4
"""Numbers of no use: the newest sound checkpoint stands."""
NOT_MATCHED = 5
"""The run is whole, and did not spend what its `match` section asks for."""
PEER_LOST = 69
"""Another rank, or the launcher, ended."""
STALLED = 70
"""The watchdog has barked."""
FOLDER_LOST = 73
"""The run folder is not there any more."""
NOT_WRITTEN = 74
"""The disk refused what must be written."""
PREEMPTED = 75
"""Asked to stop, and saved: start again with run.resume=auto."""
INTERRUPTED = 130
"""Ctrl-C; as a shell has it for the signal."""
PIPE_CLOSED = 141
"""Nobody reads what is printed any more; as a shell has it for the signal."""
