"""The rewrites of the compiler: `methods` say what is trained."""
