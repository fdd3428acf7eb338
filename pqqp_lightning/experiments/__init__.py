"""The questions that people ask: the best order, a sweep, an analysis, a prediction."""
