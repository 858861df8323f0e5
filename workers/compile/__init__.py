"""Make a runtime artefact: export, comparison with torch, INT8."""
