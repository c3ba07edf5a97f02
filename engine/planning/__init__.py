"""Sizes, hardware and limits in, plans and forecasts out. Imports no torch."""
