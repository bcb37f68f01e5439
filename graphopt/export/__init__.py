"""Floor 3: files, benchmark, comparison of files, report: what the outside gets to see."""
