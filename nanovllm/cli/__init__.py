"""The command `nanovllm`: what its subcommands need is imported when they run."""
