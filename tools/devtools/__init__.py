"""What stands behind `python dev.py demo | test | bench`, shared with the tests. Standard library only at import."""
