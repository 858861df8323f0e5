"""`labelfleet round`: from a teacher, over labels, to a student, and a page that compares them."""
