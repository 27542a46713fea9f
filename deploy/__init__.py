"""How the suite is run."""
