"""RLP: reinforcement as a pretraining objective (arXiv 2510.01265)."""
