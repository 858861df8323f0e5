"""What other programs call: a Run to read, and the steps on it; see docs/python.md."""
