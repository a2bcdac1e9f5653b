"""Arrays in, numbers out: ranking, classification, intervals. NumPy, SciPy and scikit-learn only."""
