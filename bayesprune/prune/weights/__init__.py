"""Removal of single weights: the scores that go, floors, schedules, and one shot with compensation."""
