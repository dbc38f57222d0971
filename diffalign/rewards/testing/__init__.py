"""Checks of scorers: their contract, and known numbers."""
