"""Tuning many problems: those of a model, a layer list or the log; one run over them, shared by ranks."""
