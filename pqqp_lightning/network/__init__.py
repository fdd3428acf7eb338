"""What the engine knows about a layer: its weight as a matrix, its name, the constraints it carries.

- ``layers``: Linear and Conv2d weights as matrices; ``blocks``: repeated blocks; ``name_patterns``: targets.
- ``constraints``: masks and grids that later stages must keep; ``held_zeros``: pruned entries during training.
- ``activation_hooks``: rotation and rounding of activations; ``structure``: copies of a model without its weights.
- ``quiet``: keeps the log of transformers quiet.
"""
