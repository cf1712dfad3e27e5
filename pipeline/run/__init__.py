"""The whole road as one resumable run, and its plan."""
