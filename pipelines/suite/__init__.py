"""Many data sets in one go: trained or taken, labelled, measured, in one table."""
