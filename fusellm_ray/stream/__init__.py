"""Between a trainer's rank and the teachers: the wire format, and the client that keeps it full."""
