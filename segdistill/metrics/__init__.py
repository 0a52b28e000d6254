"""Segmentation scores from integer counts."""
