"""Programs run from the checkout (`python -m conversion.graft ...`) and the library modules they share.

Programs never import each other, and everything here reaches the model through `import modeling_bmojo` alone.
"""
