"""What people contribute: their labels imported from files, measured, chosen and collected on a page."""
