"""Whether answers are right, as far as rules can tell: equality of two answers, and agreement of steps and answer."""
