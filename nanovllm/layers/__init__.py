"""Building blocks of models; each takes a BuildContext."""
