"""Everything around the core and the verification: configuration, data, training, release, server, command line."""
