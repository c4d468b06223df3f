"""Defenses: one file each; every one takes a model and clean images and gives a :class:`Repair`."""
