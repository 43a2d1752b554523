"""The engine: scheduling, caching and running, one request at a time through one loop."""
