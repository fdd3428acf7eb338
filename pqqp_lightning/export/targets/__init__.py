"""The formats, one file each. A ``Target`` subclass in a new file here needs no registration."""
