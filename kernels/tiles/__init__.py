"""Which tile a kernel is launched with."""
