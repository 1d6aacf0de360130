"""Engines that run a model: one file each, behind one small protocol."""
