"""Constitutional AI and RLAIF on one GPU: from a constitution file to an aligned adapter and a report."""

__version__ = "0.1.0"
