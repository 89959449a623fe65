"""Measuring one problem in one process: clocks, captures, a problem as something to run, the process that times it."""
