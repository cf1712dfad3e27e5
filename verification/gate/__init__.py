"""The verdict: a report of measured checks, a policy of bounds, and the decision from both."""
