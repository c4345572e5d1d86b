"""What a step is made of: micro-batches, passes, and the reward, baseline and loss, which a user
may replace."""
