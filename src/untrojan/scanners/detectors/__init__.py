"""Detectors of poisoned samples, one file each; :func:`untrojan.registry.discover` finds them."""
