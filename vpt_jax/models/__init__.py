"""Backbones: linen modules that offer the five places, and `zoo`, which names their weights."""
