"""The small trained model of the tests and the first run, and how it was made."""
