"""YOLO-NAS from super-gradients: the only room, with training/loss.py, that imports it."""
