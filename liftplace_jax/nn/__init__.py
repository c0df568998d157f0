"""What networks are made of, and a network together with its arrays."""
