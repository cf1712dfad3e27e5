"""Faults that people met, planted one at a time: a file for each place where a fault can sit."""
