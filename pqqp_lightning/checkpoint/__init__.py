"""Packs, saves and loads models, and counts their size.

- ``format``: what the checkpoint folder holds; ``save`` and ``load`` write and read it.
- ``encoding``: how each weight is stored; ``packing``: packs and unpacks one weight; ``size``: the counted size.
"""
