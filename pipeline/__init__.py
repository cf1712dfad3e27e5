"""The parts around core and gate: configuration, data, training, release, server and the command line."""
