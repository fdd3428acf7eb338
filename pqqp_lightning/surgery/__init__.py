"""Changes a network's structure: adapters, rotation, narrowing, removal, factors.

- ``adapters``: LoRA around layers; ``fake_quantize``: weights rounded in training; ``factored``: low-rank factors.
- ``decoder``: the residual stream of a language model; ``rotation``: rotates it.
- ``coupling``, ``dependency``: which channels must be removed together; ``narrowing``, ``slicing``: remove them.
- ``removal``: removes whole blocks and sublayers.
"""
