"""What the engine knows about a layer: its weight as a matrix, its name, the constraints it carries."""
