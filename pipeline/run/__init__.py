"""All steps as one resumable run, and its plan."""
