"""Making a runtime artefact: export, agreement, INT8."""
