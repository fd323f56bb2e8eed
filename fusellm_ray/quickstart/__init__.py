"""The embedded default: text found on this machine, small models built from it, a study that runs on two cores."""
