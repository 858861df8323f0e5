"""`labelfleet demo`: handwritten pages, labelled and measured."""
