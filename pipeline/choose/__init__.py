"""`so8t choose`: which file type to ship, by measuring a ladder of them on several domains and proving the choice."""
