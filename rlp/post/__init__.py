"""What follows pretraining: post-training in stages, and what it does to a model."""
