"""Changes a network's structure: adapters, rotation, narrowing, removal, factors."""
