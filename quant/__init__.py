"""Making checkpoints smaller; imports expertd, never the reverse."""
