"""Find personal data and secrets in text."""
