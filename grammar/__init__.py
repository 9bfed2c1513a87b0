"""The grammar of the specification language, as package data."""
