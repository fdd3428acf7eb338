"""Everything that a person sees of a run: words, tables and figures."""
