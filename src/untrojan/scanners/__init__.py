"""Scanners: is there a backdoor, which label does it serve, and which samples are poisoned."""
