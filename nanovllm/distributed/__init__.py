"""Groups of ranks that share one model."""
