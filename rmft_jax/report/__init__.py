"""The report room: results.json as one self-contained HTML page and as a terminal table."""
