"""Reads a command line and recipes, and says what is wrong with them."""
