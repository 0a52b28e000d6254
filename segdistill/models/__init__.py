"""Segmenters and their files. Nothing is imported here: a config must not cost what torch and timm cost."""
