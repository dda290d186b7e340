"""Lessons: each file is a program and a notebook.  They need a clone; nothing here is installed."""
