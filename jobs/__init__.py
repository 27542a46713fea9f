"""The shared definition of a job: names, ids, limits, options, errors, events and rules."""
