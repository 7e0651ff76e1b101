"""The embedded demo checkpoint: a small mixture of experts that tells stories, as package data."""
