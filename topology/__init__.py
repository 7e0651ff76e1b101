"""Hosts, processors and links as plain values."""
