"""Rules that judge answers: equality of two answers, and agreement of steps and answer."""
