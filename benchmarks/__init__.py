"""What is measured: `registry`, `layer_lists`, `networks`; how: `measure`, `checks`; how it is shown: `report`."""
