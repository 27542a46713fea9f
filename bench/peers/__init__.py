"""The peers with which the suite is compared, each in a process of its own."""
