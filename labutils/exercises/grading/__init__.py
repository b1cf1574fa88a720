"""Grading returned notebooks: each runs in a sandbox, and the checks judge only the values that come out of it.

    grader       marks one notebook, or all notebooks of a folder
    submissions  reads the notebooks: files, cells, which notebook it is, remarks for the teacher
    sandbox      a student's process, as the grader starts it, talks to it and ends it
    worker       the program that runs in that process
    wire         the messages between the two
    grades       the table of grades

This file stays a docstring: a student's process imports it too, and of these files needs only `worker` and `wire`.
"""
