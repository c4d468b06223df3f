"""Scanners: is there a backdoor, and which label does it serve."""
