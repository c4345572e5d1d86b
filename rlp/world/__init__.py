"""Two small worlds to try everything on: documents, their tiny base models, and configs."""
