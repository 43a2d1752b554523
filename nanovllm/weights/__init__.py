"""From a model's name to tensors in its layers."""
