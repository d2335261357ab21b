"""What the command line starts: one run, many runs, and what is made of their results."""
