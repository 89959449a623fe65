"""`registry`, `layer_lists` and `networks` say what is measured, `measure` and `checks` how, `report` shows it."""
