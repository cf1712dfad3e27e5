"""`so8t choose`: find the file type to ship. It measures several types on several domains and proves its choice."""
