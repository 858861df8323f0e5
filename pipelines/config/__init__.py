"""run.yaml: fields, messages, and the objects that it selects."""
