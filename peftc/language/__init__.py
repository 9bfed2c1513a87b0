"""The specification language: text to a frozen syntax tree, and back. `peftc.language.syntax` is its face.

Imports go one way: tree <- build, unparse; tokens <- explain <- reader; parse puts them together.
"""
