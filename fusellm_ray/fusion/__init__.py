"""K teachers' distributions become one, and the loss that pulls the target towards it."""
