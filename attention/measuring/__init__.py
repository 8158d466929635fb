"""Time and error of attention: statistics, verdicts, and results as data and as tables."""
