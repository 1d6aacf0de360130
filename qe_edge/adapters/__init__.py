"""Query expansion in the shape that other frameworks expect, one file each; each needs its own extra."""
