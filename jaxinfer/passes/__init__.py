"""Rewrites of a Program: each derives another form of the same computation."""
