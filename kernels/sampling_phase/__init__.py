"""The sampling phase that `bench_sampling.py` times: what is sampled, and who samples it."""
