"""Teachers as a service: engines that score text, actors that host them, pools that keep those alive, and
the supervisor that they live in."""
