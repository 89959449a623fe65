"""What a call is, and how its tensors lie."""
