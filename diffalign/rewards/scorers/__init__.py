"""The scorers, one file per model family."""
