"""Images and sounds of a forward. The first one of a stream may bring them, and later ones.

They are columns like any others: the model puts them in the place of tokens of their own before it calls its decoder.
"""
