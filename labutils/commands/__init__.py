"""The lab's commands, one module each: `python -m labutils NAME`; `arguments` has what their command lines share.

A command's module has two functions, and `labutils.__main__` lists the module:

    add(commands)       adds its parser to argparse's subparsers, with `set_defaults(run=run)`
    run(arguments)      does the work and returns the exit status: 0, or 1 for a failure, 2 for bad arguments,
                        `arguments.INTERRUPTED` after Control-C

A command that hands arguments on to another program sets `takes_extra=True` as well, and finds them in
`arguments.extra`. Modules here import torch, and whatever imports it, inside `run` and not at their top: help and bad
arguments are answered at once.
"""
