"""RLP: reinforcement as a pretraining objective (arXiv 2510.01265)."""

from rlp.process.machine import let_waiting_threads_sleep

let_waiting_threads_sleep()  # torch, which comes next, reads it once
