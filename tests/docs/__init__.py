"""The pages are true: their links lead somewhere, and what they tell a reader to run is run."""
