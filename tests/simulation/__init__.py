"""Searches in one process, their faults drawn by one seed: kills, reboots, sleeping hosts, an absent database."""
