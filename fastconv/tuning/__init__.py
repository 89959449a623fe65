"""Measuring configs of the kernels: problems as something to run, the process that measures, a run shared by ranks."""
