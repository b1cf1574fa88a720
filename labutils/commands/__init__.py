"""The lab's commands, one module each: `python -m labutils NAME`. `arguments` has what their command lines share.

A command's module has two functions, and `labutils.__main__` lists its name:

    parser()      the parser of the command's arguments, made by `arguments.new_parser`
    run(words)    parses the words after the command's name, does the work and returns the exit status: 0, or 1 for a
                  failure, 2 for bad arguments, `arguments.INTERRUPTED` after Control-C

Modules here import torch only inside `run`, never at their top, so that help and errors in arguments come at once.
"""
