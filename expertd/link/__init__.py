"""How ranks reach each other: the shared-memory mailbox."""
