"""Slots, layouts and class swapping: how a method gets into a backbone that we do not own."""
