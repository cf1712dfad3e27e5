"""One assistant text into its steps and its answer, or the reason why that is not certain."""
