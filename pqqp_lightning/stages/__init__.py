"""The contract that a method extends, its helpers, and how stages are discovered."""
