"""Measures this project on a machine with a GPU, in minutes; see README.md beside."""
