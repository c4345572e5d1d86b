"""From a gradient to new weights, and the weights to disk: engine, optimizer, teacher, checkpoint,
export."""
