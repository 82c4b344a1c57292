"""Masked autoencoding of point clouds, which makes points-mini."""
