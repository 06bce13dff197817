"""Thresholds from data: texts of a concept and texts without it to the probes of a pack."""
