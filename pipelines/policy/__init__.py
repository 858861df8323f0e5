"""What a score means: thresholds and calibration."""
