"""Split one assistant text into steps and answer, or say why no split is certain."""
