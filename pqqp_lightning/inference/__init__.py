"""Uses a finished run's model: ``generation`` continues a prompt, ``classification`` classifies images."""
