"""Training rows: read, split into thinking and answer, cleaned, labelled, masked."""
