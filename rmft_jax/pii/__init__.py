"""Host side of personal data: find it, cut it into components, draw up surrogates, number its occurrences."""
