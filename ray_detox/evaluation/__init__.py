"""The measurement before and after: metrics, statistics, judges and the verdict. No Ray."""
