"""transformers' own common tests, run on our classes: `make test-conformance`; docs/compatibility.md has the results.

The tests are in transformers' source distribution, which is obtained for the installed version and mounted as a package
(`upstream.py`); nothing of it is copied. What that distribution leaves out and its tests import is in `standins.py`.
Pytest collects nothing here by itself.
"""
