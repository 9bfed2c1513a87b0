"""Compiled models on several processes, and their trainings saved."""
