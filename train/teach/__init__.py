"""Candidate expansions from a teacher."""
