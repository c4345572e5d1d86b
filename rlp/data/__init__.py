"""From files to token ids in an order that a few integers resume, and positions in documents."""
