"""One file a kernel family: its code, launches, tiles, and why it does not serve a call."""
