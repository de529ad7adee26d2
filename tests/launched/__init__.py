"""Programs that a launcher starts by path, in a folder of their own: Python puts a script's folder first on its path,
where `tests/conversion` would stand for `conversion`, and `tests/modeling/inspect` for the standard library's.
"""
