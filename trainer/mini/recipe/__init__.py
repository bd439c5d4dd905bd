"""The recipe that made the embedded checkpoint; nothing that trains imports it."""
