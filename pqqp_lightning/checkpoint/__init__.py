"""Packs, saves and loads models, and counts their size."""
