"""Label versions written for trainers: COCO, YOLO, Hugging Face."""
