"""What is right: COCO truth, people's answers, box matching."""
