"""Generated problems with right answers, one kind of problem in each file."""
