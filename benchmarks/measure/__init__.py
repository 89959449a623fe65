"""What ``fastconv bench`` measures, a file for each kind of part."""
