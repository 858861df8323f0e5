"""COCO detection JSON, shared by everything that reads ground truth or a training set."""
