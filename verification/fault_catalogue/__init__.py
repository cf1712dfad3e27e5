"""Plants known faults and records the gate's verdict on each: this measures how many faults the gate detects."""
