"""The attacks, one file each; :func:`untrojan.registry.discover` finds them."""
