"""The heading world, to try everything on: documents, their tiny base model, and the quickstart."""
