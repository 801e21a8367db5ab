"""Finished runs -> tables, comparisons, and one page to look at: what `sparsegrad report` writes."""
