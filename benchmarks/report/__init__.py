"""What a run keeps and shows: result files, tables, plots, what rows mean for the targets; the console."""
