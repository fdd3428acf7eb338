"""Reads a command line and recipes, and reports their problems."""
