"""COCO detection JSON, read one way by everything that takes ground truth or a training set."""
