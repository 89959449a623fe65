"""The same calls by PyTorch's own operators."""
