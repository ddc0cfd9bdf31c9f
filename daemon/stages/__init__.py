"""Stages: what is asked for, planned, loaded, resident, moved and freed."""
