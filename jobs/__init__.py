"""What a job is: its names, ids, errors and rules, the workflow, the activity stubs and the live feed."""
