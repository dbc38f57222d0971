"""Rewards that are learned from judgements: losses, heads, users and calibration."""
