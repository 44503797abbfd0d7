"""Measurements on this machine: ratios within one run, never absolute promises."""
