"""The suite's workflows: deterministic code only, which any process can replay."""
