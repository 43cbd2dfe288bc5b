"""Reading, cleaning and making text corpora."""
