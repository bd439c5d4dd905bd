"""What made the embedded checkpoint; nothing that trains imports it."""
