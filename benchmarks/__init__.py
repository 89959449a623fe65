"""What is measured: operators, the networks they are read off, and who runs them. How is in `fastconv.cli.measure`."""
