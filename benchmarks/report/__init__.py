"""What is kept of a run and shown: result files, tables, plots, what rows mean for the targets; the console."""
