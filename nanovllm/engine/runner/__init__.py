"""One rank: its model, its caches, its steps."""
