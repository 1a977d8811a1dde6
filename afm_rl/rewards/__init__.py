"""Programmatic rewards and the policies on length and truncation; the actor that adds them up is `actors/reward.py`."""
