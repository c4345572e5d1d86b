"""The update step that `bench_step.py` times: what it is given, who does it, and the turns they
take."""
