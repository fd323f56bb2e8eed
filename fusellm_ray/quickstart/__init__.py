"""The embedded default: small models built from text on this machine, and a study of them."""
