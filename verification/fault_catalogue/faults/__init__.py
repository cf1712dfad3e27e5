"""Faults that people met, planted one at a time: one file for each place of a fault."""
