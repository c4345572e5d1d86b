"""Documents and positions in them: from files to token ids, in an order that a few integers
resume."""
