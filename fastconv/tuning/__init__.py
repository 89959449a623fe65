"""Tuning many problems: a model's, a layer list's or the log's, in one run that ranks may share."""
