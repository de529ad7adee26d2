"""Programs, `python -m conversion.graft ...` or installed `bmojo graft ...`, and the libraries that they share.

A file here is a program, a folder is a library. Programs import libraries, never each other. Libraries import one way:

    common  <-  data  <-  grafting  <-  training, evaluation, hmf

where `training`, `evaluation` and `hmf` do not know each other. Everything reaches the model through
`import modeling_bmojo` alone; only `common/` names modules of it, those that know files and systems.
"""
