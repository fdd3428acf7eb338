"""Everything on disk that is not weights: atomic files, the run folder, records, the result store."""
