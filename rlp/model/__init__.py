"""The language model that thinks and predicts: loading, layouts of thoughts, and scoring them."""
