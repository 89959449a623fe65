"""What ``fastconv bench`` measures, part by part, and the file, tables and plots it leaves."""
