"""Reads a command line and recipes, and reports their problems.

- ``parser``: LightningCLI's parser for the commands of ``command_table``; ``command_trainer`` gives each its options.
- ``settings``: who set which key, for the messages; ``diagnosis`` and ``class_checks`` find all problems at once.
- ``commands``, ``methods``, ``saved_recipe``: the commands that make no run of their own.
- ``light_torchmetrics``: imports torchmetrics without the metrics that nobody asked for.
"""
