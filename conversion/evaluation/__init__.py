"""Models side by side: the rows of the table, what is measured of them, and how it is told."""
