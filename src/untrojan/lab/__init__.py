"""Evaluation only: plant backdoors and measure how well they were removed.

Attacks are known nowhere else; nothing outside this package and the command line imports it.
"""
