"""Operators on tensors: check, plan, allocate, launch."""
