"""Weights brought into another format once, and kept on the disk."""
