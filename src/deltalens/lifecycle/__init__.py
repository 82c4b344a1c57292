"""Attach, freeze, count, switch, save, load, merge, import: the life of an adapter."""
