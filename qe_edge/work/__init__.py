"""Files that appear whole or not at all, the work folder, and the records of runs."""
