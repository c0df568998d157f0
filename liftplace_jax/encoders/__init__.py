"""Frozen networks between data and what a denoising network sees."""
