"""Losses that several methods share: pure functions, aware of the ignore label, in float32."""
