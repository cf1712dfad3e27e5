"""Generated problems with right answers, one family a file."""
