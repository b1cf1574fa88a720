"""Grading returned notebooks, each in a process of its own that the marks do not depend on."""
