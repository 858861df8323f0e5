"""COCO detection JSON: reading ground truth and training sets, and columns as JSON text."""
